"""The bank: many adapters over one encoder, under threads, limits, refreshes and damage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import build_encoder
from safetensors.torch import save_file

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import count_bytes
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import StoreError
from peft_combo.recipe.adapter import (
    AdaloraAdapter,
    AdapterConfig,
    FullTuning,
    HeadOnly,
    LoraAdapter,
    PrefixAdapter,
    TopLayers,
)
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.references import Version
from peft_combo.store.versions import AdapterRecord

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraAdapter(rank=4),
    "adalora": AdaloraAdapter(initial_rank=4, target_rank=2, allocate_every=1),
    "prefix": PrefixAdapter(length=4),
    "head": HeadOnly(),
    "top-layers": TopLayers(layers=1),
    "full": FullTuning(),
}
TEXTS = [" ".join(f"w{(7 * text + word) % 190}" for word in range(1 + text % 9)) for text in range(30)]


def store_adapter(
    store: AdapterStore,
    backbone: Backbone,
    category: str,
    config: AdapterConfig = METHODS["lora"],
    seed: int = 0,
    task: BundleTask | None = None,
) -> AdapterRecord:
    """Store an adapter as tuning would, with random weights instead of trained ones."""
    attached = methods.attach(
        backbone.model, config, max_length=backbone.max_length, total_steps=20, seed=seed, tokenizer=backbone.tokenizer
    )
    head = BundleHead(backbone.dim, task or BundleTask())
    noise = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in (*attached.trainable().values(), *head.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.2)
    with store.writing(category) as draft:
        attached.save(draft.path, backbone.base_name)
        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, draft.path / HEAD_FILE)
        return draft.commit(
            {
                "method": config.method,
                "stored_as": attached.stored_as,
                "task": head.spec(),
                "backbone": backbone.stamp(),
                "recipe": {},
                "data": {"name": "none", "digest": "0", "split_digest": "0"},
                "metrics": {},
                "versions": {},
            }
        )


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run jobs at the same time; return what they returned, or raise what one raised."""
    ready = threading.Barrier(len(jobs))

    def start(job: Callable[[], Any]) -> Any:
        ready.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(start, job) for job in jobs]]


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=16)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture(scope="module")
def every_method(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """A store with an adapter of each method."""
    store = AdapterStore(tmp_path_factory.mktemp("methods"))
    for seed, (method, config) in enumerate(METHODS.items()):
        store_adapter(store, backbone, method, config, seed)
    return store


# --- answers ----------------------------------------------------------------------------------------------------------


def test_each_method_encodes_as_its_adapter_alone_while_all_are_loaded(
    backbone: Backbone, every_method: AdapterStore
) -> None:
    alone = {}
    for method in METHODS:
        alone[method] = backbone.encode(TEXTS, backbone.attach(every_method.open(method)))
    bank = AdapterBank(backbone, every_method)
    for method in [*METHODS, *reversed(METHODS)]:
        np.testing.assert_array_equal(bank.encode(TEXTS, method), alone[method])
    np.testing.assert_array_equal(bank.encode(TEXTS, None), backbone.encode(TEXTS))
    different = [method for method in METHODS if np.abs(alone[method] - backbone.encode(TEXTS)).max() > 1e-3]
    assert different == [method for method in METHODS if method != "head"]


def test_a_mixed_request_equals_each_adapter_alone_for_every_method(
    backbone: Backbone, every_method: AdapterStore
) -> None:
    bank = AdapterBank(backbone, every_method)
    names: list[str | None] = [*METHODS, None]
    references = [names[row * 5 % len(names)] for row in range(len(TEXTS))]
    mixed = bank.encode_mixed(TEXTS, references)
    for name in names:
        rows = [row for row, reference in enumerate(references) if reference == name]
        assert rows
        np.testing.assert_array_equal(mixed[rows], bank.encode([TEXTS[row] for row in rows], name))
        # Other texts in the same pass change the padding, and with it the last bits.
        np.testing.assert_allclose(mixed[rows], bank.encode(TEXTS, name)[rows], atol=1e-6)


def test_each_adapter_of_a_mixed_request_runs_in_one_pass(
    backbone: Backbone, every_method: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank(backbone, every_method)
    passes, encode = [], backbone.encode

    def counted(texts: Sequence[str], adapter: Any = None) -> Any:
        passes.append(len(texts))
        return encode(texts, adapter)

    monkeypatch.setattr(backbone, "encode", counted)
    bank.encode_mixed(TEXTS[:7], ["lora", None, "lora@v1", "full", "lora", None, "lora"])
    assert passes == [4, 2, 1]  # lora@v1 is what lora means


@pytest.mark.parametrize(("one", "other"), [("food", "seafood"), ("a", "b"), ("a", "a-b"), ("v1", "v1_v1")])
def test_names_that_contain_each_other_do_not_mix(
    backbone: Backbone, store: AdapterStore, one: str, other: str
) -> None:
    for seed, category in enumerate((one, other)):
        store_adapter(store, backbone, category, seed=seed)
    bank = AdapterBank(backbone, store)
    mixed = bank.encode_mixed([TEXTS[3]] * 4, [one, other, one, other])
    np.testing.assert_array_equal(mixed[0], mixed[2])
    assert np.abs(mixed[0] - mixed[1]).max() > 1e-3
    for row, category in enumerate((one, other)):
        expected = backbone.encode([TEXTS[3]], backbone.attach(store.open(category)))
        np.testing.assert_array_equal(mixed[row], expected[0])


def test_heads_of_different_shapes_live_side_by_side(backbone: Backbone, store: AdapterStore) -> None:
    tasks = {
        "plain": BundleTask(projection="none"),
        "linear": BundleTask(),
        "attention": BundleTask(pooling="attention"),
        "both": BundleTask(pooling="attention", projection="none"),
    }
    for seed, (category, task) in enumerate(tasks.items()):
        store_adapter(store, backbone, category, METHODS["head"], seed, task)
    bank = AdapterBank(backbone, store)
    items = torch.from_numpy(bank.encode(TEXTS, None))
    contexts = torch.tensor([[0, 1, 2], [3, 4, -1]])
    for category, task in tasks.items():
        live = bank.get(category)
        assert live.head.config == task
        assert not live.head.training
        query = live.head.query(items, contexts)
        mean = torch.nn.functional.normalize(torch.stack([items[:3].mean(0), items[3:5].mean(0)]), dim=1)
        assert torch.allclose(query, mean, atol=1e-6) == (category == "plain")


def test_an_empty_mixed_request_is_an_empty_answer(backbone: Backbone, store: AdapterStore) -> None:
    assert AdapterBank(backbone, store).encode_mixed([], []).shape == (0, backbone.dim)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_asked_for(backbone: Backbone, every_method: AdapterStore) -> None:
    bank = AdapterBank(backbone, every_method)
    assert bank.loaded == ()
    live = bank.get("lora")
    assert bank.loaded == (live,)
    assert bank.get("lora") is bank.get("lora@v1") is live
    assert live.digest == every_method.open("lora").digest


def test_many_threads_asking_at_once_load_it_once(
    backbone: Backbone, every_method: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank(backbone, every_method)
    loads, attach = [], backbone.attach
    monkeypatch.setattr(backbone, "attach", lambda record: (loads.append(record.reference), attach(record))[1])
    found = in_threads([lambda name=name: bank.get(name) for name in ["lora", "full", "lora@v1"] * 8])
    assert sorted(loads) == ["full@v1", "lora@v1"]
    assert len({id(live) for live in found}) == 2
    assert not bank._gates


def test_a_slow_load_holds_up_nobody_who_wants_something_else(
    backbone: Backbone, every_method: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank(backbone, every_method)
    bank.get("lora")
    begun, go_on, attach = threading.Event(), threading.Event(), backbone.attach

    def slow(record: AdapterRecord) -> Any:
        if record.reference == "full@v1":
            begun.set()
            assert go_on.wait(30)
        return attach(record)

    monkeypatch.setattr(backbone, "attach", slow)
    with ThreadPoolExecutor(1) as pool:
        full = pool.submit(bank.get, "full")
        assert begun.wait(30)
        bank.encode(TEXTS, "lora")  # in memory
        bank.get("head")  # to be loaded
        assert not full.done()
        go_on.set()
        assert full.result(30).reference == "full@v1"


def test_loading_from_many_threads_leaves_the_warning_filters_alone(
    backbone: Backbone, every_method: AdapterStore
) -> None:
    import warnings

    before = list(warnings.filters)
    banks = [AdapterBank(backbone, every_method, limit_mib=0) for _ in range(4)]
    in_threads([lambda bank=bank: [bank.get(name) for name in [*METHODS] * 2] for bank in banks])
    assert warnings.filters == before


def test_a_failed_load_leaves_the_bank_as_it_was(backbone: Backbone, store: AdapterStore) -> None:
    store_adapter(store, backbone, "food", seed=0)
    bank = AdapterBank(backbone, store)
    kept, answer = bank.get("food"), bank.encode(TEXTS, "food")
    damaged = store_adapter(store, backbone, "toys", seed=1)
    newer = store_adapter(store, backbone, "food", seed=2)
    for record in (damaged, newer):
        weights = record.path / methods.WEIGHTS_FILE
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for attempt in (
        lambda: bank.get("toys"),
        lambda: bank.get("food@v2"),
        lambda: bank.refresh("food"),
        lambda: bank.get("fod"),
        lambda: bank.encode_mixed(TEXTS[:2], ["food", "toys"]),
        lambda: bank.encode(TEXTS, ""),
        lambda: bank.encode_mixed(TEXTS[:1], [""]),
    ):
        with pytest.raises(StoreError):
            attempt()
        assert bank.loaded == (kept,)
        assert bank.get("food") is kept
    np.testing.assert_array_equal(bank.encode(TEXTS, "food"), answer)
    assert not bank._gates


def test_a_head_that_does_not_fit_is_refused(backbone: Backbone, store: AdapterStore) -> None:
    record = store_adapter(store, backbone, "food")
    with store.writing("food") as draft:
        for name in record.manifest.files:
            (draft.path / name).write_bytes(record.read(name))
        save_file({"query_projection.weight": torch.zeros(3, 3)}, draft.path / HEAD_FILE)
        said = record.manifest.model_dump(mode="json")
        for owned in ("format", "category", "version", "created", "files"):
            del said[owned]
        draft.commit(said)
    with pytest.raises(StoreError, match="does not match its description"):
        AdapterBank(backbone, store).get("food")


def test_another_backbone_is_refused(backbone: Backbone, every_method: AdapterStore, tmp_path: Path) -> None:
    other = Backbone.load(str(build_encoder(tmp_path, seed=1)), max_length=16)
    bank = AdapterBank(other, every_method)
    with pytest.raises(StoreError, match="was tuned on"):
        bank.encode(TEXTS, "lora")
    assert bank.loaded == ()


def test_one_reference_for_each_text_is_asked_for(backbone: Backbone, every_method: AdapterStore) -> None:
    with pytest.raises(ValueError, match="found 1 for 2 texts"):
        AdapterBank(backbone, every_method).encode_mixed(TEXTS[:2], ["lora"])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_second_adapter_costs_its_own_size_and_not_the_backbones(
    backbone: Backbone, every_method: AdapterStore
) -> None:
    bank = AdapterBank(backbone, every_method)
    shared = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    whole = count_bytes(backbone.model)
    for method in METHODS:
        live = bank.get(method)
        pointers = {tensor.data_ptr(): tensor for tensor in (*live.attached.encoder.parameters(),)}
        own = [tensor for pointer, tensor in pointers.items() if pointer not in shared]
        assert live.nbytes == sum(4 * tensor.numel() for tensor in own) + count_bytes(live.head)
        assert (len(pointers) - len(own) == len(shared)) == (method in ("lora", "adalora", "prefix", "head"))
        assert (live.nbytes > whole) == (method == "full")
        assert (live.nbytes == count_bytes(live.head)) == (method == "head")
    files = every_method.open("lora").manifest.files
    stored = files[methods.WEIGHTS_FILE].bytes + files[HEAD_FILE].bytes
    assert bank.get("lora").nbytes == pytest.approx(stored, rel=0.3)  # their headers name every tensor
    assert bank.nbytes == sum(live.nbytes for live in bank.loaded)


@pytest.mark.parametrize("method", METHODS)
def test_files_that_change_under_a_loaded_adapter_do_not_reach_it(
    backbone: Backbone, every_method: AdapterStore, method: str, store: AdapterStore
) -> None:
    record = store_adapter(store, backbone, method, METHODS[method])
    bank = AdapterBank(backbone, store)
    live, before = bank.get(method), bank.encode(TEXTS, method)
    for name in record.manifest.files:
        (record.path / name).write_bytes(b"")
    np.testing.assert_array_equal(bank.encode(TEXTS, method), before)
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or str(record.path) not in mapped.read_text()
    assert bank.get(method) is live


def test_the_longest_unused_go_first(backbone: Backbone, store: AdapterStore) -> None:
    for seed, category in enumerate("abcd"):
        store_adapter(store, backbone, category, seed=seed)
    size = AdapterBank(backbone, store).get("a").nbytes
    bank = AdapterBank(backbone, store, limit_mib=3 * size / 2**20)
    held = {name: bank.get(name) for name in "abc"}
    assert bank.nbytes == 3 * size == bank.limit_bytes
    bank.get("a")
    bank.get("d")
    assert [live.reference for live in bank.loaded] == ["c@v1", "a@v1", "d@v1"]
    assert bank.get("a") is held["a"]
    again = bank.get("b")
    assert again is not held["b"]
    assert [live.reference for live in bank.loaded] == ["d@v1", "a@v1", "b@v1"]
    # What was let go still works for whoever holds it.
    np.testing.assert_array_equal(backbone.encode(TEXTS, held["c"].attached), bank.encode(TEXTS, "c"))


def test_an_adapter_above_the_limit_is_kept_alone(backbone: Backbone, every_method: AdapterStore) -> None:
    bank = AdapterBank(backbone, every_method, limit_mib=0)
    for method in ("lora", "full", "head"):
        live = bank.get(method)
        assert bank.loaded == (live,)
        assert bank.get(method) is live


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_limit_that_is_no_size_is_refused(backbone: Backbone, store: AdapterStore, limit: float) -> None:
    with pytest.raises(ValueError, match="limit_mib"):
        AdapterBank(backbone, store, limit)


def test_no_limit_is_a_limit_too(backbone: Backbone, every_method: AdapterStore) -> None:
    bank = AdapterBank(backbone, every_method, float("inf"))
    assert [bank.get(method) for method in METHODS] == list(bank.loaded)


# --- refreshing -------------------------------------------------------------------------------------------------------


def test_a_category_means_the_same_version_until_it_is_refreshed(backbone: Backbone, store: AdapterStore) -> None:
    first, second = (store_adapter(store, backbone, "food", seed=seed) for seed in range(2))
    bank = AdapterBank(backbone, store)
    assert bank.get("food@v1").reference == first.reference  # asking for one version decides nothing
    assert bank.get("food").reference == second.reference
    store_adapter(store, backbone, "food", seed=2)
    assert bank.get("food").reference == "food@v2"
    refreshed = bank.refresh("food")
    assert refreshed.reference == "food@v3"
    assert bank.get("food") is refreshed is bank.refresh("food")
    # What the category meant before goes first when room is needed.
    assert bank.loaded[0].reference == "food@v2"
    # Back to the newest there is, when the newest was taken out.
    store.remove("food@v3")
    assert bank.get("food") is refreshed
    assert bank.refresh("food").reference == "food@v2"


def test_an_alias_means_the_same_version_until_it_is_refreshed_and_then_where_it_points(
    backbone: Backbone, store: AdapterStore
) -> None:
    for seed in range(3):
        store_adapter(store, backbone, "food", seed=seed)
    store.alias("food@v1", "prod")
    bank = AdapterBank(backbone, store)
    old = bank.get("food@prod")
    assert (old.reference, bank.get("food").reference) == ("food@v1", "food@v3")
    assert bank.get("food@v1") is old  # the same object: one version is loaded once, whatever it is called
    store.alias("food@v2", "prod")
    assert bank.get("food@prod") is old
    assert bank.refresh("food@prod").reference == "food@v2"
    assert (bank.get("food@prod").reference, bank.get("food").reference) == ("food@v2", "food@v3")
    store.rollback("food@prod")
    assert bank.refresh("food@prod") is old
    assert bank.encode(TEXTS, "food@prod").tobytes() == bank.encode(TEXTS, "food@v1").tobytes()
    with pytest.raises(StoreError, match="is one version and stays it"):
        bank.refresh("food@v2")
    with pytest.raises(StoreError, match='No alias "prd" of food'):
        bank.get("food@prd")


def test_a_load_that_meets_a_promotion_and_a_removal_gets_what_the_alias_points_to_by_then(
    backbone: Backbone, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        store_adapter(store, backbone, "food", seed=seed)
    store.alias("food@v1", "prod")
    bank = AdapterBank(backbone, store)
    resolve = store.resolve

    def slow(reference: str) -> Version:
        version = resolve(reference)
        monkeypatch.setattr(store, "resolve", resolve)
        store.alias("food@v2", "prod")
        store.remove("food@v1")
        return version

    monkeypatch.setattr(store, "resolve", slow)
    assert bank.get("food@prod").reference == "food@v2"


def test_an_evicted_adapter_comes_back_as_the_same_version(backbone: Backbone, store: AdapterStore) -> None:
    for category in ("food", "toys"):
        store_adapter(store, backbone, category)
    bank = AdapterBank(backbone, store, limit_mib=0)
    bank.get("food")
    store_adapter(store, backbone, "food", seed=1)
    bank.get("toys")
    assert [live.reference for live in bank.loaded] == ["toys@v1"]
    assert bank.get("food").reference == "food@v1"


def test_refreshing_what_was_never_asked_for_loads_it(backbone: Backbone, store: AdapterStore) -> None:
    store_adapter(store, backbone, "food")
    bank = AdapterBank(backbone, store)
    assert bank.refresh("food") is bank.get("food")
    with pytest.raises(StoreError, match="No adapter for category"):
        bank.refresh("toys")


def test_every_answer_is_one_versions_while_versions_are_added_and_refreshed(
    backbone: Backbone, store: AdapterStore
) -> None:
    """Threads ask for texts of three categories while new versions come, adapters are evicted and loaded again."""
    plan = [METHODS[name] for name in ("lora", "prefix", "adalora", "top-layers", "head")]
    solo: dict[str, dict[str, bytes]] = {"food": {}, "seafood": {}, "toys": {}}

    def add(category: str, seed: int) -> None:
        record = store_adapter(store, backbone, category, plan[seed % len(plan)], seed)
        attached = backbone.attach(record)
        # Before anybody can be given this version, its answer is known: the store's readers wait for no one.
        solo[category][record.reference] = backbone.encode(TEXTS, attached).tobytes()

    for seed, category in enumerate(solo):
        add(category, seed)
    size = AdapterBank(backbone, store).get("food").nbytes
    bank = AdapterBank(backbone, store, limit_mib=2.5 * size / 2**20)
    for category in solo:
        bank.refresh(category)
    done = threading.Event()

    def ask(number: int) -> int:
        answers, names = 0, list(solo)
        while not done.is_set() or answers < 5:
            one, other = names[(number + answers) % 3], names[(number + answers + 1) % 3]
            if answers % 2:
                assert bank.encode(TEXTS, one).tobytes() in solo[one].values(), one
            else:
                vectors = bank.encode_mixed([*TEXTS, *TEXTS], [one] * len(TEXTS) + [other] * len(TEXTS))
                assert vectors[: len(TEXTS)].tobytes() in solo[one].values(), one
                assert vectors[len(TEXTS) :].tobytes() in solo[other].values(), other
            answers += 1
        return answers

    def renew() -> int:
        try:
            for seed in range(3, 15):
                category = list(solo)[seed % 3]
                add(category, seed)
                version = bank.refresh(category)
                assert bank.get(category).record.version >= version.record.version
        finally:
            done.set()
        return 0

    counts = in_threads([renew, *(lambda number=number: ask(number) for number in range(4))])
    assert min(counts[1:]) >= 5
    assert all(len(versions) == 5 for versions in solo.values())
    for category, versions in solo.items():
        assert bank.encode(TEXTS, category).tobytes() == versions[f"{category}@v5"]


def test_threads_with_different_caps_on_length_get_their_own(backbone: Backbone, store: AdapterStore) -> None:
    """A prefix takes positions, so its texts are cut shorter than those of other adapters in other threads."""
    long = [" ".join(f"w{(text + word) % 190}" for word in range(60)) for text in range(20)]
    roomy = Backbone(backbone.name, backbone.model, backbone.tokenizer, "mean", 62)
    store_adapter(store, roomy, "prefix", PrefixAdapter(length=8))
    store_adapter(store, roomy, "lora")
    bank = AdapterBank(roomy, store)
    alone = {name: bank.encode(long, name) for name in ("prefix", "lora")}
    assert bank.get("prefix").attached.max_length < bank.get("lora").attached.max_length

    def ask(name: str) -> None:
        for _ in range(15):
            np.testing.assert_array_equal(bank.encode(long, name), alone[name])

    in_threads([lambda name=name: ask(name) for name in ("prefix", "lora") * 2])


def test_a_first_request_that_meets_a_refresh_gets_the_newer_version(
    backbone: Backbone, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_adapter(store, backbone, "food", seed=0)
    bank = AdapterBank(backbone, store)
    resolve = store.resolve

    def slow(reference: str) -> Version:
        version = resolve(reference)
        monkeypatch.setattr(store, "resolve", resolve)
        store_adapter(store, backbone, "food", seed=1)
        bank.refresh("food")
        return version

    monkeypatch.setattr(store, "resolve", slow)
    assert bank.get("food").reference == "food@v2"
