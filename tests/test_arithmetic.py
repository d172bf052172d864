"""Stored adapters compared, merged, converted and tried: by hand where numbers are small, by vectors where not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import build_encoder
from safetensors.torch import load_file
from scipy import sparse
from test_bank import store_adapter
from torch import Tensor

from peft_combo.adapters.convert import ConvertError, convert
from peft_combo.adapters.deltas import Spectrum, combine_changes, read_changes
from peft_combo.adapters.diff import diff
from peft_combo.adapters.merge import MergeError, merge
from peft_combo.adapters.transfer import measure_alignment, transfer
from peft_combo.adapters.validation import ValidationQueries
from peft_combo.data.queries import Queries
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.methods.attached import WEIGHTS_FILE
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe.adapter import (
    AdapterConfig,
    BitfitTuning,
    BottleneckAdapter,
    HeadOnly,
    Ia3Adapter,
    LayerNormTuning,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
    OftAdapter,
    PrefixAdapter,
    RandloraAdapter,
    VeraAdapter,
)
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore

TEXTS = [" ".join(f"w{(11 * text + 5 * word) % 190}" for word in range(1 + text % 9)) for text in range(40)]
QUESTIONS = Queries.leave_one_out([np.array([row, row + 1, row + 15], np.int32) for row in range(20)], ["g"] * 20)
LORA = LoraAdapter(rank=4)


class Shelf:
    """A store over a tiny encoder, filled with adapters of random weights."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.store, self.backbone = AdapterStore(folder), backbone
        self.bank = AdapterBank(backbone, self.store)

    def put(self, category: str, config: AdapterConfig = LORA, seed: int = 0, **task: Any) -> LiveAdapter:
        chosen = BundleTask(**task) if task else None
        return self.bank.get(store_adapter(self.store, self.backbone, category, config, seed, chosen).reference)

    def merge(self, *parents: LiveAdapter, **options: Any) -> Any:
        return merge(parents, self.backbone, self.store, "both", **options)

    def convert(self, live: LiveAdapter, **options: Any) -> Any:
        return convert(live, self.backbone, self.store, texts=TEXTS, **options)


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=12)


@pytest.fixture
def shelf(backbone: Backbone, tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "adapters", backbone)


def row(*values: float) -> dict[str, Tensor]:
    return {"m": torch.tensor([values], dtype=torch.float32)}


# --- combining, by hand -----------------------------------------------------------------------------------------------


def test_an_average_is_weighted_and_takes_what_one_lacks_as_zero() -> None:
    mean = combine_changes([row(1, -2), row(5, 6) | {"n": torch.tensor([[4.0]])}], [0.75, 0.25], "average", 1, 0)
    assert mean["m"].tolist() == [[2, 0]]
    assert mean["n"].tolist() == [[1]]


def test_ties_trims_elects_a_sign_and_averages_who_agrees() -> None:
    # Half of six values stay: of the first 3, -2, 1.5; of the second -4, -2, 5.
    first, second = row(1.5, -2, 0.5, 3, 0.1, 0.2), row(-4, -2, 0.1, 1, 0.2, 5)
    # Sums of what stays: -2.5, -4, 0, 3, 0, 5. Alone at the first place the second has that sign.
    assert combine_changes([first, second], [0.5, 0.5], "ties", 0.5, 0)["m"].tolist() == [[-4, -2, 0, 3, 0, 5]]
    # With three quarters of the weight the first one's 1.5 against -4 is 1.125 to -1, so its sign wins.
    assert combine_changes([first, second], [0.75, 0.25], "ties", 0.5, 0)["m"].tolist() == [[1.5, -2, 0, 3, 0, 5]]
    # The trim is over a whole adapter: a module of small values alone vanishes.
    whole = [{"m": torch.tensor([[9.0, 8.0]]), "n": torch.tensor([[1.0, 2.0]])}]
    assert combine_changes(whole, [1.0], "ties", 0.5, 0)["n"].tolist() == [[0, 0]]
    # Equal and opposite: no sign wins.
    assert combine_changes([row(1), row(-1)], [0.5, 0.5], "ties", 1, 0)["m"].tolist() == [[0]]


def test_dare_drops_by_chance_and_makes_up_for_it_by_scale() -> None:
    ones = {"m": torch.ones(100, 100)}
    kept = combine_changes([ones], [1.0], "dare", 0.25, 7)["m"]
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1, abs=4 * math.sqrt(3) / 100)  # four deviations of the mean
    assert torch.equal(kept, combine_changes([ones], [1.0], "dare", 0.25, 7)["m"])
    assert not torch.equal(kept, combine_changes([ones], [1.0], "dare", 0.25, 8)["m"])
    two = combine_changes([ones, ones], [0.5, 0.5], "dare", 0.25, 7)["m"]
    assert set(two.unique().tolist()) == {0.0, 2.0, 4.0}  # each adapter has chances of its own
    assert combine_changes([row(1, 2), row(3, 4)], [0.5, 0.5], "dare", 1, 0)["m"].tolist() == [[2, 3]]


def test_a_spectrum_tells_the_rank_an_error_needs() -> None:
    spectrum = Spectrum.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2))
    assert (spectrum.norm, spectrum.rank(), spectrum.rank(0.59), spectrum.rank(0.61)) == (5, 2, 2, 1)
    left, right = spectrum.factors(1)
    assert torch.allclose(left @ right, torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert torch.linalg.norm(left) == torch.linalg.norm(right) == 2
    assert spectrum.error((left, right)) == pytest.approx(3)
    assert Spectrum.of(torch.zeros(2, 3), torch.ones(2, 3)).rank() == 0
    # What a float32 weight cannot hold is no rank: one direction, seen through the rounding of a large weight.
    weight, update = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)), torch.full((30, 20), 1e-4)
    assert Spectrum.of((weight + update) - weight, weight).rank() == 1
    assert Spectrum.of((weight + update) - weight, torch.zeros(30, 20)).rank() == 20


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"method": "svd"}, {"method": "ties", "density": 1.0}, {"method": "dare", "density": 1.0}]
)
def test_an_adapter_merged_with_itself_is_itself(options: dict[str, Any], shelf: Shelf) -> None:
    one, other = shelf.put("one"), shelf.put("other")
    done = shelf.merge(one, other, weights=[3, 1], **options)
    assert done.parents == (("one@v1", 0.75), ("other@v1", 0.25))
    assert set(done.ranks.values()) == {4}  # not the eight of two adapters side by side
    assert done.truncation < 1e-5
    live = shelf.bank.get(done.record.reference)
    assert np.abs(shelf.backbone.encode(TEXTS, live.attached) - shelf.backbone.encode(TEXTS, one.attached)).max() < 1e-5
    for name, tensor in live.head.state_dict().items():
        assert torch.allclose(tensor, one.head.state_dict()[name], atol=1e-7), name


def test_a_merge_is_the_mean_of_the_changes_and_says_what_it_is_of(shelf: Shelf) -> None:
    inside = shelf.put("inside", LoraAdapter(rank=4, targets="query+value"), 1)
    beside = shelf.put("beside", VeraAdapter(rank=8, targets=("output.dense", "attention.self.query")), 2)
    done = shelf.merge(inside, beside, weights=[1, 3])
    manifest = done.record.manifest
    assert (manifest.method, manifest.stored_as, manifest.metrics, done.rows) == ("merge-average", "lora", {}, ())
    derived: Any = manifest.model_dump()["data"]["derived"]
    assert derived["operation"] == "merge"
    assert derived["from"] == [
        {"adapter": "inside@v1", "digest": inside.digest, "weight": 0.25},
        {"adapter": "beside@v1", "digest": beside.digest, "weight": 0.75},
    ]
    parents = [read_changes(one.attached).linear for one in (inside, beside)]
    merged = read_changes(shelf.bank.get("both").attached).linear
    assert set(merged) == set(parents[0]) | set(parents[1])
    for name, change in merged.items():
        wanted = sum(
            share * parent[name] for share, parent in zip((0.25, 0.75), parents, strict=True) if name in parent
        )
        assert torch.allclose(change, torch.as_tensor(wanted), atol=1e-6), name
    head = shelf.bank.get("both").head
    assert head.query_projection is not None
    mean = 0.25 * inside.head.state_dict()["query_projection.weight"]
    mean = mean + 0.75 * beside.head.state_dict()["query_projection.weight"]
    assert torch.allclose(head.query_projection.weight, mean)
    assert float(head.log_scale) == pytest.approx(
        0.25 * float(inside.head.log_scale) + 0.75 * float(beside.head.log_scale)
    )


def test_svd_holds_the_rank_and_measures_what_it_leaves_out(shelf: Shelf) -> None:
    parents = shelf.put("one", LORA, 1), shelf.put("two", LORA, 2)
    done = shelf.merge(*parents, method="svd", rank=3)
    assert set(done.ranks.values()) == {3}
    changes = [read_changes(one.attached).linear for one in parents]
    values = [torch.linalg.svdvals((changes[0][name] + changes[1][name]).double() / 2) for name in changes[0]]
    lost, whole = (sum(float(v.square().sum()) for v in part) for part in ([v[3:] for v in values], values))
    assert done.truncation == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert done.record.manifest.model_dump()["data"]["derived"]["truncation"] == done.truncation
    tensors = load_file(done.record.file(WEIGHTS_FILE))
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {3}
    # By itself it takes the rank of a parent; the mean whole needs both.
    assert set(shelf.merge(*parents, method="svd").ranks.values()) == {4}
    assert set(shelf.merge(*parents).ranks.values()) == {8}
    again = [shelf.merge(*parents, method="dare", seed=5).record.manifest.files[WEIGHTS_FILE] for _ in range(2)]
    assert again[0] == again[1]


def test_heads_alone_merge_into_a_head(shelf: Shelf) -> None:
    done = shelf.merge(shelf.put("one", HeadOnly(), 1), shelf.put("two", HeadOnly(), 2))
    assert (done.record.manifest.stored_as, done.ranks, done.truncation) == ("head", {}, 0)
    assert np.array_equal(shelf.bank.encode(TEXTS, "both"), shelf.backbone.encode(TEXTS))
    assert "adapter_config.json" not in done.record.manifest.files


def test_what_does_not_go_together_is_refused_with_the_reason(shelf: Shelf, tiny_bert: Path) -> None:
    one, two = shelf.put("one", LORA, 1), shelf.put("two", LORA, 2)
    longer = Shelf(shelf.store.path, Backbone.load(str(tiny_bert), max_length=16)).put("longer")
    for parents, options, expected in (
        ((one,), {}, "at least 2 adapters to merge, found 1"),
        ((one, two), {"weights": [1, 2, 3]}, "weights: expected 2 numbers above 0, one an adapter, found 1, 2, 3"),
        ((one, two), {"weights": [1, -1]}, "numbers above 0"),
        ((one, two), {"density": 0.5}, "average keeps every value. A density goes with ties and dare"),
        ((one, two), {"method": "ties", "density": 0.0}, "above 0 and at most 1, found 0"),
        ((one, two), {"rank": 4}, "Use the method svd"),
        ((one, two), {"method": "svd", "rank": 0}, "at least 1, found 0"),
        ((one, longer), {}, "one@v1 has max_length 12, longer@v1 has 16"),
        ((one, shelf.put("bare", LORA, 3, projection="none")), {}, "projection linear, bare@v1 has none"),
        ((one, shelf.put("looking", LORA, 3, pooling="attention")), {}, "pooling mean, looking@v1 has attention"),
        ((one, shelf.put("biases", BitfitTuning(), 3)), {}, "biases, norms or embeddings"),
    ):
        with pytest.raises(MergeError, match=expected):
            shelf.merge(*parents, **options)
    with pytest.raises(BackboneError, match=r"prefix@v1: .* cannot be merged: it adds keys and values"):
        shelf.merge(one, shelf.put("prefix", PrefixAdapter(length=2), 3))
    assert "both" not in shelf.store.categories()


# --- comparing --------------------------------------------------------------------------------------------------------


def test_an_adapter_beside_itself_differs_in_nothing(shelf: Shelf) -> None:
    found = diff(shelf.put("one"), shelf.put("same"), shelf.backbone, texts=TEXTS, questions=QUESTIONS)
    assert found.notes == ()
    assert [change.name for change in found.layers] == ["layer 0", "layer 1", "layer 2", "all of these"]
    assert len(found.modules) == 18
    for change in (*found.layers, *found.modules, *found.head):
        assert change.a == change.b > 0
        assert change.cosine == pytest.approx(1)
    assert {change.directions for change in found.modules} == {4}
    assert [change.overlap for change in found.modules] == pytest.approx([1] * 18)
    answers = found.predictions
    assert answers is not None
    assert answers.cosine == pytest.approx(1)
    assert (answers.neighbours, answers.first_churn, answers.list_churn) == (1, 0, 0)
    assert answers.ndcg is not None
    assert answers.ndcg[0] == answers.ndcg[1]


def test_norms_cosines_and_subspaces_are_those_of_the_changes(shelf: Shelf) -> None:
    one = shelf.put("one", LoraAdapter(rank=4, alpha=4, targets="query+value"))
    # The same factors at twice the alpha: twice the change, in the same directions.
    double = shelf.put("double", LoraAdapter(rank=4, alpha=8, targets="query+value"))
    found = diff(one, double, shelf.backbone)
    name = "encoder.layer.1.attention.self.value"
    change = next(change for change in found.modules if change.name == name)
    delta = read_changes(one.attached).linear[name]
    assert change.a == pytest.approx(
        float(delta.norm() / shelf.backbone.model.get_submodule(name).weight.norm()), rel=1e-5  # type: ignore[operator]
    )  # fmt: skip
    assert change.b == pytest.approx(2 * change.a, rel=1e-5)
    assert change.cosine == pytest.approx(1)
    assert change.overlap == pytest.approx(1)
    assert found.predictions is None
    # Adapters that share no module have nothing in common.
    elsewhere = diff(one, shelf.put("elsewhere", LoraAdapter(rank=4, targets=("output.dense",))), shelf.backbone)
    assert elsewhere.layers[-1].cosine == 0
    assert {change.cosine for change in elsewhere.modules} == {None}
    # Random subspaces share as much as chance: on average directions / width.
    other = diff(one, shelf.put("other", LoraAdapter(rank=4, targets="query+value"), 9), shelf.backbone)
    assert np.mean([change.overlap for change in other.modules]) == pytest.approx(4 / 32, abs=0.06)


def test_another_head_changes_answers_and_no_vectors(shelf: Shelf) -> None:
    one, other = shelf.put("one", HeadOnly(), 1), shelf.put("other", HeadOnly(), 2)
    answers = diff(one, other, shelf.backbone, texts=TEXTS, questions=QUESTIONS).predictions
    assert answers is not None
    assert answers.cosine == pytest.approx(1)
    assert answers.neighbours == 1
    assert answers.first_churn
    assert answers.list_churn
    assert 0 < answers.first_churn <= answers.list_churn <= 1


def test_what_is_no_change_of_weights_is_compared_by_its_answers_alone(shelf: Shelf) -> None:
    found = diff(shelf.put("one"), shelf.put("prefix", PrefixAdapter(length=2)), shelf.backbone, texts=TEXTS)
    assert (found.layers, found.modules) == ((), ())
    assert "Weights were not compared" in found.notes[0]
    assert "keys and values" in found.notes[0]
    assert found.predictions is not None
    assert found.predictions.cosine < 0.999
    assert found.predictions.questions is None
    biases = diff(shelf.put("one"), shelf.put("biases", BitfitTuning(), projection="none"), shelf.backbone)
    assert "encoder.layer.0.output.LayerNorm.bias" in {change.name for change in biases.modules}
    assert biases.notes == ("The heads differ in projection: linear and none.",)


# --- converting -------------------------------------------------------------------------------------------------------

CONVERTIBLE = {
    "vera": VeraAdapter(rank=6),
    "loha": LohaAdapter(rank=2),
    "lokr": LokrAdapter(rank=2),
    "randlora": RandloraAdapter(rank=8),
    "oft": OftAdapter(block_size=16),
    "dora": LoraAdapter(rank=4, dora=True),
    "ia3": Ia3Adapter(),  # the tiny encoder's biases are zero, so scaling them changes nothing
}
RANKS = {"vera": 6, "loha": 4}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_what_changes_linear_weights_gives_the_same_vectors_as_lora(name: str, shelf: Shelf) -> None:
    live = shelf.put("one", CONVERTIBLE[name])
    done = shelf.convert(live)
    assert done.record.reference == "one@v2"
    assert done.error < 1e-5
    assert done.difference < 3e-5
    vectors = shelf.bank.encode(TEXTS, "one@v2")
    assert float(np.abs(vectors - shelf.backbone.encode(TEXTS, live.attached)).max()) == done.difference
    assert np.abs(vectors - shelf.backbone.encode(TEXTS)).max() > 1e-3  # and not those of the frozen encoder
    if name in RANKS:
        assert set(done.ranks.values()) == {RANKS[name]}
        assert done.bytes_merged == 4 * 3 * (4 * 32 * 32 + 2 * 32 * 48)  # six weights in three layers
    manifest = done.record.manifest
    assert (manifest.method, manifest.stored_as) == (live.record.manifest.method, "lora")
    derived: Any = manifest.model_dump()["data"]["derived"]
    assert derived["from"] == [{"adapter": "one@v1", "digest": live.digest}]
    assert derived["vector_difference"] == done.difference
    with pytest.raises(ConvertError, match="one@v2 is plain LoRA already"):
        shelf.convert(shelf.bank.get("one@v2"))


def test_an_inexact_conversion_has_to_be_asked_for_and_says_how_far_off_it_is(shelf: Shelf) -> None:
    live = shelf.put("one", LohaAdapter(rank=2))
    with pytest.raises(ConvertError, match=r"no LoRA of rank 2 within an error of 1e-05(.|\n)*needs rank 4; at 2 it"):
        shelf.convert(live, rank=2)
    done = shelf.convert(live, max_error=0.5)
    assert max(done.ranks.values()) < 4
    assert 1e-3 < done.error <= 0.5
    assert done.difference > 1e-4
    assert done.record.manifest.metrics == {}


def test_what_no_lora_can_do_is_refused_with_the_reason(shelf: Shelf) -> None:
    for number, (config, expected) in enumerate(
        (
            (BitfitTuning(), "biases, norms or embeddings, which a LoRA has no place for: embeddings.LayerNorm.bias"),
            (LayerNormTuning(), "layer-norm.* embeddings.LayerNorm.weight"),
            (HeadOnly(), "changes no weight: nothing to convert"),
        )
    ):
        with pytest.raises(ConvertError, match=expected):
            shelf.convert(shelf.put(f"c{number}", config))
    for number, (config, expected) in enumerate(
        ((PrefixAdapter(length=2), "keys and values"), (BottleneckAdapter(size=4), "layers with a bend")), 10
    ):
        with pytest.raises(BackboneError, match=f"cannot be served as LoRA.*{expected}"):
            shelf.convert(shelf.put(f"c{number}", config))
    live = shelf.put("vera", VeraAdapter(rank=4))
    for options, expected in (({"rank": 0}, "at least 1"), ({"max_error": 2}, "above 0 and below 1, found 2")):
        with pytest.raises(ConvertError, match=expected):
            shelf.convert(live, **options)
    assert all(shelf.store.versions(category) == (1,) for category in shelf.store.categories())


# --- trying -----------------------------------------------------------------------------------------------------------


def test_alignment_is_linear_cka_with_the_membership_of_bundles() -> None:
    members = sparse.csr_matrix(np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], np.float32))
    together = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [9, 9]], np.float32)  # the fifth item is in no bundle
    assert measure_alignment(together, members) == pytest.approx(1)
    assert measure_alignment(np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], np.float32), members) == pytest.approx(
        0
    )
    rng = np.random.default_rng(0)
    random, drawn = rng.normal(size=(30, 6)).astype(np.float32), rng.random((12, 30)) < 0.2
    x, y = random[drawn.any(0)].astype(np.float64), drawn.T[drawn.any(0)].astype(np.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    wanted = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert measure_alignment(random, sparse.csr_matrix(drawn.astype(np.float32))) == pytest.approx(wanted)


def test_candidates_are_compared_with_the_frozen_encoder_and_foreign_ones_left_out(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    validation = ValidationQueries.of(recipe)
    shelf = Shelf(Path(recipe.store), Backbone.of(recipe.backbone))
    with pytest.raises(StoreError, match=r"No adapter in .* to start from"):
        transfer(validation, shelf.backbone, shelf.store)
    shelf.put("old", LORA, 1)
    shelf.put("old", LORA, 2)
    shelf.put("heads", HeadOnly(), 3)
    foreign = Backbone.load(str(build_encoder(tmp_path / "foreign", seed=1)), max_length=16)
    store_adapter(shelf.store, foreign, "foreign")
    found = transfer(validation, shelf.backbone, shelf.store)
    assert {(start.adapter, start.head) for start in found.starts} == {
        (name, head) for name in ("old@v2", "heads@v1") for head in ("own", "identity")
    }
    values = [start.row.values["ndcg@10"] for start in found.starts]
    assert values == sorted(values, reverse=True)
    # A head alone leaves the encoder as it is, and under cosine it is the frozen encoder.
    same = next(start for start in found.starts if (start.adapter, start.head) == ("heads@v1", "identity"))
    assert same.row.values == found.frozen.values
    assert (same.gain.value, same.gain.p, same.alignment) == (0, 1, found.frozen_alignment)
    assert {start.caveat for start in found.starts} == {"what it learned from is not known here"}
    assert found.advised is None  # random adapters are no start
    assert found.notes[0].startswith("foreign@v1 was left out: it was tuned on another encoder")
    with pytest.raises(StoreError, match="tuned on"):
        transfer(validation, shelf.backbone, shelf.store, ["foreign"])


def test_a_caveat_says_what_flatters_an_adapter(tiny_recipe: Callable[..., Any]) -> None:
    recipe = tiny_recipe()
    validation = ValidationQueries.of(recipe)
    shelf = Shelf(Path(recipe.store), Backbone.of(recipe.backbone))
    manifest = shelf.put("one", HeadOnly()).record.manifest

    def caveat(split_digest: str, **data: Any) -> str:
        stamp = manifest.data.model_copy(update={"split_digest": split_digest})
        tuned = {"data": {**recipe.model_dump(mode="json")["data"], **data}} if data else {}
        return validation.caveat(manifest.model_copy(update={"data": stamp, "recipe": tuned}))

    assert caveat(validation.parts.digest) == "these questions were its own for validation"
    assert caveat("other") == "what it learned from is not known here"
    assert caveat("other", path="another/shop") == ""
    assert caveat("other", split_seed=9) == "it may have learned from these bundles"
    assert caveat("other", category_filter="Style 1") == "some of these questions were its own for validation"


def test_the_commands_from_a_tuned_adapter_on(
    shell: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    tiny_recipe: Callable[..., Any],
) -> None:  # fmt: skip
    import yaml

    import peft_combo.cli.adapter_tools  # noqa: F401  (registers the commands)
    from peft_combo.tuning.loop import tune

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(**{"data.valid_fraction": 0.4, "training.epochs": 6, "training.early_stopping": None})
    tune(recipe)
    tune(recipe.model_copy(update={"category": "twin", "seed": 1}), run_folder=tmp_path / "twin")
    Path("new.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    other = {"data.valid_fraction": 0.4, "data.split_seed": 3}
    Path("other.yaml").write_text(yaml.safe_dump(tiny_recipe(**other).model_dump(mode="json")))

    call = partial(shell, "adapters")
    code, out, err = call("diff", "tiny", "tiny@v1", "--recipe", "new.yaml")
    assert code == 0, err
    assert "the first answer changes in 0.0%" in out
    assert "encoder.layer.2.attention.self.query" in out
    code, out, _ = call("diff", "tiny", "twin", "--json")
    assert (code, json.loads(out)["predictions"]) == (0, None)

    code, out, err = call("merge", "tiny", "twin", "--into", "both", "--method", "ties", "--recipe", "new.yaml")
    assert code == 0, err
    assert "Note: twin@v1: these questions were its own for validation." in out
    shown = json.loads(call("show", "both", "--json")[1])
    figures = shown["metrics"]
    assert set(figures["baselines"]) == {"tiny@v1", "twin@v1"}
    assert figures["before"]["ndcg@10"]["value"] < figures["baselines"]["tiny@v1"]["ndcg@10"]["value"]
    assert "test bundles were not looked at" in figures["protocol"]
    code, out, _ = call("merge", "tiny", "twin", "--into", "mean", "--json")
    assert (code, json.loads(out)["rows"]) == (0, [])
    assert "not measured" in call("list")[1]

    code, out, err = call("transfer", "--recipe", "new.yaml", "tiny", "mean", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["advised"] in ("tiny@v1", "mean@v1")
    assert min(s["gain"]["p"] for s in found["starts"] if s["adapter"] == found["advised"]) * 4 < 0.05  # four rows
    # Asked questions it may have learned from, an adapter is shown with that said, and not advised.
    code, out, _ = call("transfer", "--recipe", "other.yaml", "tiny")
    assert "it may have learned from these bundles" in out
    assert "start without --from" in out

    for words, expected in (
        (("convert", "tiny"), "tiny@v1 is plain LoRA already: nothing to convert"),
        (("merge", "tiny", "twin", "--into", "x", "--weights", "2,one"), "expected numbers with commas"),
        (("merge", "tiny", "twin", "--into", "x", "--data", "shop"), "go with --recipe"),
        (("diff", "tiny", "tinny"), 'Did you mean "tiny"?'),
        (("diff", "tiny", "twin", "--texts", "none.txt"), "none.txt cannot be read"),
    ):
        code, out, err = call(*words)
        assert (code, out) == (1, ""), words
        assert expected in err
        assert "Traceback" not in err
