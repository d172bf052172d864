"""Anything at all in recipes, manifests, alias files and adapter folders: read, or refused in words of ours.

Every case runs under Python's audit hook: nothing is unpickled, no code is compiled or started, no connection is made,
and no file outside the case's own folder is opened, written, moved or deleted.

`HYPOTHESIS_PROFILE=thorough` runs forty times as many cases.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_adapter_store import FIELDS, write
from test_importing import foreign

from peft_combo.adapters.import_peft import import_adapter
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import PeftComboError, StoreError, make_printable
from peft_combo.recipe.files import load_recipe, read_recipe_text
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.aliases import parse_alias
from peft_combo.store.manifest import parse_manifest
from peft_combo.store.references import parse_reference
from peft_combo.store.versions import AdapterRecord

_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
_COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": _QUIET}
settings.register_profile("ci", max_examples=150, **_COMMON)
settings.register_profile("thorough", max_examples=6_000, **_COMMON)
FUZZ = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
# Most of these cases are sound and put an adapter onto an encoder.
COSTLY = settings(FUZZ, max_examples=FUZZ.max_examples // 3)

NAMES = st.sampled_from(
    ["..", ".", "", "/", "a/b", "../outside", "/etc/passwd", "~", "con", "\0", "a\0b", "\ud800", "é", "e\u0301",
     "\u202e", "\uff0e\uff0e", "v1", "v0", "latest", "prod", "x" * 300, "fashion@v1", "-rf", "%2e%2e", "a\nb",
     "__proto__"]
) | st.text(max_size=12)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES | st.sampled_from([2**63, -1, 10**30, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


# --- the guard --------------------------------------------------------------------------------------------------------

_WRITES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.rmtree",
}  # fmt: skip
_FORBIDDEN = {"pickle.find_class", "exec", "compile", "subprocess.Popen", "os.system", "socket.connect", "os.exec"}
_guarded: list[Path] = []  # the folder of the case that is running
_caught: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event in _FORBIDDEN and not (event == "exec" and _library(Path(arguments[0].co_filename))):
        _caught.append(f"{event} {arguments!r:.200}")
    if event not in _WRITES and event != "open":
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return  # below a folder that is open already: rmtree, whose own event named it
    for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
        if not isinstance(path, str | bytes | os.PathLike):
            continue  # a descriptor, which was opened by name before
        real = Path(os.path.abspath(os.fsdecode(path)))
        inside = real.is_relative_to(_guarded[0])
        if not inside and not (event == "open" and _library(real)):
            _caught.append(f"{event} {path!r:.200}")


def _library(path: Path) -> bool:
    """Python reads its own modules when it first needs them, and PEFT looks at the machine."""
    return path.is_relative_to(sys.prefix) or path.is_relative_to(sys.base_prefix) or path.is_relative_to(_ROOT)


_ROOT = Path(__file__).resolve().parent.parent
sys.addaudithook(_watch)  # for good: Python has no way to take one back, so it looks at `_guarded` first


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Let nothing out of `folder`, and let nothing but our own errors through as a refusal."""
    _caught.clear()
    _guarded.append(folder)
    try:
        yield
    finally:
        _guarded.clear()
    assert _caught == []


@pytest.fixture(autouse=True)
def _nothing_unpickles_and_nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here


def test_the_guard_sees_what_it_is_there_for(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    acts: list[Callable[[], Any]] = [
        lambda: (tmp_path / "new").write_text("x"),
        lambda: os.rename(inside, tmp_path / "moved"),
        lambda: (tmp_path / "moved").rmdir(),
        lambda: eval("1 + 1"),
    ]
    for act in acts:
        with pytest.raises(AssertionError, match="assert"), guarded(inside):
            act()
    with pytest.raises(AssertionError, match="unpickled"):
        torch.load(inside)


def refused_or(act: Callable[[], Any]) -> Any:
    """Return what `act` returns, or None where it refuses in one of our errors, which has to be printable."""
    try:
        return act()
    except PeftComboError as error:
        text = str(error)
        assert all(make_printable(line) == line for line in text.split("\n")), ascii(text)
        assert max(len(line) for line in text.splitlines()) < 2000
        return None


def fresh(tmp_path: Path) -> Path:
    """Return a new folder for one case; pytest clears them all, since deleting costs more than the case itself."""
    return Path(tempfile.mkdtemp(dir=tmp_path)).resolve()


# --- recipes ----------------------------------------------------------------------------------------------------------

_LINES = read_recipe_text("lora-fashion").splitlines()
with suppress(PeftComboError):  # what pydantic imports at its first refusal is imported by now
    load_recipe("lora-fashion", ["adapter.rank=no"])


@FUZZ
@given(
    order=st.lists(st.sampled_from(_LINES) | NAMES | st.text(max_size=30), max_size=25),
    overrides=st.lists(st.tuples(st.sampled_from(["adapter.rank", "data.path", "store", "extends"]) | NAMES, NAMES),
                       max_size=3),
    extends=st.none() | NAMES,
)  # fmt: skip
def test_recipes(tmp_path: Path, order: list[str], overrides: list[tuple[str, str]], extends: str | None) -> None:
    text = "\n".join([*([] if extends is None else [f"extends: {json.dumps(extends)}"]), *order])
    (tmp_path / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with guarded(tmp_path):
        recipe = refused_or(lambda: load_recipe(tmp_path / "fuzz.yaml", [f"{key}={value}" for key, value in overrides]))
    if recipe is not None:
        assert type(recipe).model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three versions: `prod` went from the first to the second, `canary` is the third."""
    store = AdapterStore(tmp_path_factory.mktemp("pristine") / "store")
    for value in range(3):
        write(store, value=float(value))
    store.alias("fashion@v1", "prod")
    store.alias("fashion@v2", "prod")
    store.alias("fashion@v3", "canary")
    return store.path


def copied(pristine: Path, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(fresh(tmp_path) / "store")
    shutil.copytree(pristine, store.path)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@FUZZ
@given(reference=NAMES | NAMES.map("fashion@{}".format), name=NAMES)
def test_references_and_aliases_by_any_name(pristine: Path, tmp_path: Path, reference: str, name: str) -> None:
    store = copied(pristine, tmp_path)
    with guarded(store.path):
        for act in (parse_reference, store.open, store.resolve, store.verify, store.rollback, store.aliases):
            refused_or(lambda act=act: act(reference))  # type: ignore[misc]
        refused_or(lambda: store.alias("fashion", name))
        refused_or(lambda: store.alias(reference, name))
        refused_or(lambda: store.unalias(reference))
        assert store.verify() == []
    assert store.versions("fashion") == (1, 2, 3)
    assert all(store.open(alias.reference).version == alias.version for alias in store.aliases())


MOVES = st.fixed_dictionaries(
    {"version": st.integers(-1, 5) | JSON, "at": st.just("2026-01-01T00:00:00Z") | st.datetimes().map(str) | JSON},
    optional={"rollback": st.booleans() | JSON, "more": JSON},
)
ALIAS_FILES = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from([1, 2, 0, "1", True]),
        "category": st.just("fashion") | NAMES,
        "name": st.just("prod") | NAMES,
        "moves": st.lists(MOVES, max_size=5) | JSON,
        "more": JSON,
    },
).map(lambda value: json.dumps(value).encode())


@FUZZ
@given(content=ALIAS_FILES | st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), file=NAMES)
def test_alias_files(pristine: Path, tmp_path: Path, content: bytes, file: str) -> None:
    alias, faults = parse_alias(content, "fashion", "prod")
    assert (alias is None) == bool(faults)
    store = copied(pristine, tmp_path)
    (store.path / ".aliases" / "fashion@prod.json").write_bytes(content)
    with suppress(OSError, ValueError):  # a name no file can have
        if "/" not in file:
            (store.path / ".aliases" / file).write_bytes(content)
    with guarded(store.path):
        record: AdapterRecord | None = refused_or(lambda: store.open("fashion@prod"))
        assert record is None or (alias is not None and record.version == alias.version)
        for fault in store.verify():
            assert make_printable(str(fault)) == str(fault)
        refused_or(store.aliases)
        refused_or(lambda: store.rollback("fashion@prod"))
        refused_or(lambda: store.remove("fashion@v2"))
        refused_or(lambda: store.collect(1))
        refused_or(lambda: store.alias("fashion@v3", "prod"))
        refused_or(lambda: store.unalias("fashion@prod"))
    assert 3 in store.versions("fashion")  # the newest is no garbage, and nothing asked for its removal
    if alias is None:
        assert store.versions("fashion") == (1, 2, 3)  # where it points is not known, so nothing goes


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(["imported", "files", "data", "metrics", "created", "task"]), JSON))
def test_manifests(pristine: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    store = copied(pristine, tmp_path)
    path = store.path / "fashion" / "v1" / "manifest.json"
    content = json.dumps({**json.loads(path.read_bytes()), **changes}).encode()
    path.write_bytes(content)
    manifest, faults = parse_manifest(content)
    assert (manifest is None) == bool(faults)
    with guarded(store.path):
        refused_or(lambda: store.open("fashion@v1"))
        store.list()
        store.verify()
        # Whatever it says of its age, an alias would roll back to it.
        assert store.collect(1) == ()


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(sorted({*FIELDS, "imported"})) | NAMES, JSON, max_size=3), name=NAMES)
def test_what_a_writer_says_and_leaves_in_its_draft(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    store = AdapterStore(fresh(tmp_path) / "store")
    with guarded(store.path), suppress(StoreError), store.writing("fashion") as draft:
        save_file({"weight": np.ones(2, np.float32)}, draft.path / "head.safetensors")
        with suppress(OSError, ValueError):
            if "/" not in name and name not in ("", ".", ".."):
                (draft.path / name).write_bytes(b"x")
        draft.commit({**FIELDS, **fields})
    assert store.verify() == []


# --- adapter folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genuine(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("genuine") / "peft", tiny_bert)[0]


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path, genuine: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Everything that is imported at first use is imported by now, so that the guard may forbid it."""
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    import_adapter(genuine, "fashion", backbone, AdapterStore(tmp_path_factory.mktemp("warm")))
    return backbone


CONFIG_KEYS = st.sampled_from(
    ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
     "bias", "init_lora_weights", "modules_to_save", "auto_mapping", "base_model_name_or_path", "revision",
     "layers_pattern", "layer_replication", "megatron_config", "megatron_core", "num_virtual_tokens", "peft_version",
     "task_type", "loftq_config", "runtime_config", "exclude_modules"]
) | NAMES  # fmt: skip
CONFIG_VALUES = (
    JSON
    | st.sampled_from(["LORA", "PREFIX_TUNING", "ADALORA", "pissa", "(a+)+$", "os.system", 4, 5, 2**40, True])
    | st.dictionaries(st.sampled_from(["query", "layer.0.attention.self.query", "(.*)+", ".."]), JSON, max_size=2)
)


def tried(folder: Path, backbone: Backbone, root: Path) -> AdapterRecord | None:
    """Import under guard; what is stored afterwards is whole, and something only where it was accepted."""
    store = AdapterStore(root / "store")
    with guarded(root):
        record: AdapterRecord | None = refused_or(lambda: import_adapter(folder, "fashion", backbone, store))
    assert store.verify() == []
    assert [one.reference for one in store.list()] == ([] if record is None else ["fashion@v1"])
    return record


@COSTLY
@given(changes=st.dictionaries(CONFIG_KEYS, CONFIG_VALUES, min_size=1, max_size=3))
def test_adapter_configurations(genuine: Path, backbone: Backbone, tmp_path: Path, changes: dict[str, Any]) -> None:
    root = fresh(tmp_path)
    shutil.copytree(genuine, root / "peft")
    config = json.loads((genuine / "adapter_config.json").read_text())
    (root / "peft" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    record = tried(root / "peft", backbone, root)
    if record is not None:
        stored = json.loads(record.read("adapter_config.json"))
        assert stored["r"] == 4
        assert stored["base_model_name_or_path"] == backbone.base_name
        assert record.manifest.imported is not None


@FUZZ
@given(data=st.data())
def test_adapter_weights(genuine: Path, backbone: Backbone, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((genuine / "adapter_model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    match data.draw(st.sampled_from(["cut", "length", "flip", "header", "any", "grow"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "length":
            content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        case "flip":
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, 8 + header - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "header":
            tensors = json.loads(content[8 : 8 + header])
            name = data.draw(st.sampled_from(sorted(tensors)))
            entry = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
            key = data.draw(st.sampled_from([*entry, "more"]))
            tensors[data.draw(st.just(name) | NAMES)] = {
                **entry, key: data.draw(JSON | st.lists(st.integers(0, 2**62), max_size=3))
            }  # fmt: skip
            changed = json.dumps(tensors).encode()
            content[: 8 + header] = len(changed).to_bytes(8, "little") + changed
        case "any":
            content = bytearray(data.draw(st.binary(max_size=100)))
        case "grow":
            content += data.draw(st.binary(min_size=1, max_size=100))
    root = fresh(tmp_path)
    shutil.copytree(genuine, root / "peft")
    (root / "peft" / "adapter_model.safetensors").write_bytes(content)
    tried(root / "peft", backbone, root)


@COSTLY
@given(
    files=st.dictionaries(
        st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"]) | NAMES,
        st.sampled_from(["text", "pickle", "link", "folder", "pipe", "sparse", "gone"]),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_adapter_folders(genuine: Path, backbone: Backbone, tmp_path: Path, files: dict[str, str]) -> None:
    root = fresh(tmp_path)
    shutil.copytree(genuine, root / "peft")
    (root / "secret.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "SECRET"}')
    for name, kind in files.items():
        with suppress(OSError, ValueError):
            spoil(root, name, kind)
    record = tried(root / "peft", backbone, root)
    if record is not None:
        assert set(record.manifest.files) == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors",
        }  # fmt: skip
        assert b"SECRET" not in b"".join(contents(record.path).values())


def spoil(root: Path, name: str, kind: str) -> None:
    path = root / "peft" / name
    if "/" in name or name in ("", ".", ".."):
        return
    path.unlink(missing_ok=True)
    match kind:
        case "text":
            path.write_text("not what it should be")
        case "pickle":
            path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
        case "link":
            path.symlink_to(root / "secret.json")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "sparse":
            path.touch()
            os.truncate(path, 2**40)
