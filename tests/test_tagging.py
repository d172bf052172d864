"""The tagging task: the mistakes of textbooks are absent, and it goes through the loop like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StopAt
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_combo.cli.app import app
from peft_combo.data.labels.tags import TaggedText, entities, words_of
from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.tagging import AdapterTagger, TaggingHead, find_first_pieces, tag_texts
from peft_combo.errors import RecipeError
from peft_combo.recipe.adapter import LoraAdapter
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.gather import gather_shares
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.tagging import Dictionary, Tagging

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def piece_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a tokenizer that parts words: "w12x" is "w12" and "##x"."""
    from made_up import build_encoder, save_tokenizer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder = build_encoder(tmp_path_factory.mktemp("piece-bert"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##x", *(f"w{n}" for n in range(194))]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    save_tokenizer(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 texts. Whether an odd or an even thing (w10 or w11) is clothing or a shoe depends on the word before it."""
    rng = np.random.default_rng(7)
    lines = []
    for _ in range(240):
        tokens, tags = [], []
        for _ in range(int(rng.integers(1, 4))):
            before, thing = int(rng.integers(2)), int(rng.integers(2))
            kind = ("Clo", "Shoe")[(before + thing) % 2]
            tokens += [f"w{40 + int(rng.integers(60))}", ("w1", "w2")[before], f"w{10 + thing}x"]
            tags += ["O", "O", f"B-{kind}"]
            if rng.random() < 0.4:
                tokens.append("w30x")
                tags.append(f"I-{kind}")
        lines.append(json.dumps({"tokens": tokens, "tags": tags}))
    folder = tmp_path_factory.mktemp("tagged")
    (folder / "tags.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, piece_bert: Path, tagged: Path) -> MakeRecipe:
    def make(method: str = "lora", **changes: Any) -> Recipe:
        given = {
            "backbone.model": str(piece_bert), "backbone.max_length": 24, "task": {"kind": "tagging"},
            "data.path": str(tagged), "training.epochs": 2, "training.learning_rate": 1e-2,
        }  # fmt: skip
        return tiny_recipe(method, **{**given, **changes})

    return make


def run(recipe: Recipe, tmp_path: Path, **options: Any) -> TuneResult:
    return tune(recipe, run_folder=tmp_path / "run", **options)


def test_it_learns_is_stored_and_tags_the_same_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(
        **{
            "adapter": {"method": "lora", "rank": 8}, "training.epochs": 12, "training.learning_rate": 5e-3,
            "training.early_stopping": {"patience": 20},
        }
    )  # fmt: skip
    result = run(made, tmp_path)
    table = result.table
    assert [row.name for row in table.rows] == [
        "dictionary of the training entities", "words around + logistic regression", "frozen backbone", "tuned",
    ]  # fmt: skip
    assert table.gain.value > 0.1
    assert table.gain.p < 0.05
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert result.record.manifest.task["tag_set"] == ["O", "B-Clo", "I-Clo", "B-Shoe", "I-Shoe"]
    (types, *_) = table.details
    assert [row[0] for row in types.rows] == ["Clo", "Shoe"]
    # Out of the files again, over texts that are tagged as new ones.
    backbone = Backbone.of(made.backbone)
    live = AdapterBank(backbone, AdapterStore(made.store)).get("tiny")
    task = build_task(made)
    assert isinstance(task, Tagging)
    task.head(backbone, live.attached.max_length)
    states = {row: backbone.states([task.texts[row]], live.attached) for row in task._test}
    again = task.predict(live.head_as(TaggingHead), lambda rows: np.concatenate([states[row] for row in rows]))
    assert task.table(again, again).after.values["f1"] == pytest.approx(table.after.values["f1"], abs=1e-6)
    texts = [task.texts[row] for row in task._test]
    found = tag_texts(backbone, live.attached, live.head_as(TaggingHead), texts)
    for row, text, tags, own in zip(task._test, texts, again, found, strict=True):
        words = task._texts[row].words
        assert [(e.type, e.text) for e in own] == [
            (kind, text[words[start][0] : words[end - 1][1]]) for kind, start, end in entities(tags)
        ]
        assert all(0 < e.score <= 1 and text[e.start : e.end] == e.text for e in own)
    # And on the command line, marked.
    call = ["tag", *texts[:2], "--adapter", "tiny", "--store", made.store]
    told = CliRunner().invoke(app, call)
    assert told.exit_code == 0
    marked = texts[0]
    for entity in reversed(found[0]):
        marked = f"{marked[: entity.start]}[{entity.text}]({entity.type}){marked[entity.end :]}"
    assert told.stdout.splitlines()[0] == marked
    listed = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert [[e["text"] for e in one["entities"]] for one in listed] == [[e.text for e in own] for own in found[:2]]
    # As what takes queries apart it says the same, however often and in whatever order it is asked.
    tagger = AdapterTagger(backbone, live.attached, live.head_as(TaggingHead))
    for asked in ([1, 2, 0, 1], [0], []):
        for place, own in zip(asked, tagger([texts[place] for place in asked]), strict=True):
            assert [(e.type, e.start, e.end) for e in own] == [(e.type, e.start, e.end) for e in found[place]]
    refused = CliRunner().invoke(app, ["classify", "w1", "--adapter", "tiny", "--store", made.store])
    assert "tuned for tagging; expected one tuned for classification" in str(refused.exception)


def test_a_word_speaks_through_its_first_piece_alone() -> None:
    special = (0, 0)
    # "running shoes": [CLS] runn ##ing shoe ##s [SEP]
    pieces = [special, (0, 4), (4, 7), (8, 12), (12, 13), special]
    assert find_first_pieces([(0, 7), (8, 13)], pieces).tolist() == [1, 3]
    assert find_first_pieces([(0, 7), (8, 13)], [special, (0, 4), (4, 7), special]).tolist() == [1, -1]  # cut
    # Pieces may be wider than words ("(blue" as one), and a word may be nothing to the tokenizer.
    assert find_first_pieces([(0, 1), (1, 5), (6, 7), (8, 9)], [special, (0, 5), (8, 9), special]).tolist() == [
        1,
        -1,
        -1,
        2,
    ]


def test_special_tokens_padding_and_further_pieces_have_no_label(recipe: MakeRecipe, piece_bert: Path) -> None:
    task = build_task(recipe())
    assert isinstance(task, Tagging)
    backbone = Backbone.load(str(piece_bert), max_length=24)
    task.head(backbone, 24)
    batch = task.batch(0)
    tokens = backbone.tokenize([task.texts[row] for row in batch.items])
    asked = tokens.ids[batch.pieces]
    texts = [task._texts[row] for row in batch.items]
    words = [word.removesuffix("x") for one in texts for word in one.tokens]
    # One label a word, at the very piece that the word begins with; and nothing else has one.
    assert backbone.tokenizer.convert_ids_to_tokens(asked.tolist()) == words
    assert len(batch.pieces) < len(tokens.ids)
    wanted = [task._tags[column] for column in batch.targets.wanted.argmax(1)]
    assert wanted == [tag for one in texts for tag in one.tags]


def test_a_word_that_was_cut_off_is_missed_and_not_forgiven(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(**{"backbone.max_length": 8, "training.epochs": 1})
    task = build_task(made)
    assert isinstance(task, Tagging)
    task.head(Backbone.of(made.backbone), 8)
    cut = sum(int((first < 0).sum()) for first in task._first)
    assert cut > 0
    table = run(made, tmp_path).table
    wanted = sum(len(entities(task._texts[row].tags)) for row in task._test)
    assert f"the {wanted:,} entities" in table.asked
    seen = sum(
        all(task._first[row][start:end] >= 0) for row in task._test for _, start, end in entities(task._texts[row].tags)
    )
    assert table.after.values["recall"] <= seen / wanted < 1


def test_what_it_is_compared_with_does_not_depend_on_dropout(recipe: MakeRecipe, tmp_path: Path) -> None:
    calm = run(recipe(**{"training.epochs": 1}), tmp_path / "calm").table
    wild = run(recipe(**{"training.epochs": 1, "task.head_dropout": 0.9}), tmp_path / "wild").table
    assert wild.before == calm.before  # scored in evaluation mode


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_fast_path_leaves_the_result_what_it_would_have_been(
    method: str, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the same start: a minimum over states that differ in their last bits is the same within its tolerance only.
    monkeypatch.setattr(Tagging, "start", lambda *_: None)
    same = {"training.epochs": 1, **({"adapter.dropout": 0.0} if method == "lora" else {})}
    fast = run(recipe(method, **same), tmp_path / "fast")
    plain = run(recipe(method, **same, **{"training.fast_path": False}), tmp_path / "plain")
    np.testing.assert_allclose(fast.losses, plain.losses, rtol=1e-4)


def test_a_run_that_died_goes_on_to_the_same_end(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(**{"training.epochs": 2, "training.accumulation": 2})
    straight = run(made, tmp_path / "straight")
    with pytest.raises(SystemExit):
        tune(made, run_folder=tmp_path / "run", callback=StopAt(8))
    resumed = run(made, tmp_path, resume=True)
    assert resumed.losses == straight.losses
    theirs = load_file(straight.record.path / "head.safetensors")
    assert all(torch.equal(t, theirs[n]) for n, t in load_file(resumed.record.path / "head.safetensors").items())


def test_cached_states_are_those_of_the_whole_encoder(piece_bert: Path) -> None:
    backbone = Backbone.load(str(piece_bert), max_length=24)
    attached = methods.attach(backbone.model, LoraAdapter(top_layers=1), max_length=24, total_steps=5, seed=0)
    texts = ["w1 w2x w3", "w4", "w1 w2x w3", "w5xy w6 w7 w8"]
    items = ItemEncoder(backbone, attached, texts, per_token=True)
    assert items.cached_bytes > 0
    np.testing.assert_allclose(items.catalogue(items.frozen), backbone.states(texts), atol=1e-5)
    some = items.catalogue(items.frozen, np.array([3, 0]))
    np.testing.assert_allclose(some, backbone.states([texts[3], texts[0]]), atol=1e-5)
    # Alone or among longer texts, a text has the same states.
    np.testing.assert_allclose(backbone.states(texts)[:6], backbone.states(texts[:1]), atol=1e-5)


@pytest.mark.parametrize("sizes", [[3, 1, 4, 2, 5], [1, 1, 1, 1], [2]])
def test_shares_of_any_length_are_put_together_and_each_gets_its_gradient(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = 3
    rows = np.array(sizes)
    whole = torch.arange(float(rows.sum() * 2)).reshape(-1, 2)
    texts = list(whole.split(sizes))
    shares = [torch.cat([whole[:0], *texts[p::processes]]) for p in range(processes)]

    def all_gather(parts: list[torch.Tensor], padded: torch.Tensor) -> None:
        for part, share in zip(parts, shares, strict=True):
            part.zero_()[: len(share)] = share

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    weights = torch.arange(1.0, 1 + len(whole))[:, None]
    for process in range(processes):
        own = shares[process].clone().requires_grad_()
        gathered = gather_shares(own, rows, process, processes)
        assert torch.equal(gathered, whole)
        (gathered * weights).sum().backward()
        wanted = torch.cat([weights[:0], *list(weights.split(sizes))[process::processes]]) * processes
        assert own.grad is not None
        assert torch.equal(own.grad, wanted.expand(-1, 2))


def one(text: str, tags: str) -> TaggedText:
    return TaggedText(text, words_of(text), tuple(tags.split()))


def test_the_dictionary_knows_training_entities_longest_first() -> None:
    train = [
        one("red ankle boot", "O B-Shoe I-Shoe"), one("boot", "B-Shoe"), one("flat boot", "O B-Shoe"),
        one("flat", "B-Shoe"), one("flat cap", "O B-Acc"), one("flat bag", "O B-Acc"),
    ]  # fmt: skip
    found = Dictionary.of(train)
    # "flat" was an entity once in four: it is none.
    assert found.types == {("ankle", "boot"): "Shoe", ("boot",): "Shoe", ("cap",): "Acc", ("bag",): "Acc"}
    assert found.tag([one("Ankle boot boot bag", "O O O O")]) == [("B-Shoe", "I-Shoe", "B-Shoe", "B-Acc")]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"kind": "tagging", "tags": "slots"}, "needs the types of the slots"),
        ({"kind": "tagging", "types": {"bag": "Acc"}}, "only it does"),
        ({"kind": "tagging", "tags": "slots", "types": {"bag": "Bag"}}, 'expected one of Clo, Shoe, Acc; found "Bag"'),
    ],
)
def test_types_that_do_not_suit_are_refused(task: dict[str, Any], told: str, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=told):
        tiny_recipe(task=task)


@pytest.fixture
def closet(tmp_path: Path) -> Path:
    """80 titles with slots."""

    def rows() -> Iterator[str]:
        for number in range(80):
            slot, noun = (("top", "shirt"), ("shoes", "boots"), ("bag", "tote"))[number % 3]
            yield f"i{number},w{20 + number % 30} w{60 + number} {noun},{slot}"

    folder = tmp_path / "closet"
    folder.mkdir()
    (folder / "items.csv").write_text("item_id,title,slot\n" + "\n".join(rows()) + "\n")
    (folder / "bundles.csv").write_text("bundle_id,item_id\nb,i0\nb,i1\n")
    return folder


@pytest.mark.parametrize("name", ["tag-fashion", "tag-texts"])
def test_the_shipped_recipes_run(name: str, piece_bert: Path, closet: Path, tagged: Path, tmp_path: Path) -> None:
    own = [f"backbone.model={piece_bert}", f"store={tmp_path / 'store'}", "backbone.max_length=16", "training.epochs=1"]
    result = run(
        load_recipe(name, [*own, "adapter.top_layers=1"], closet if name == "tag-fashion" else tagged), tmp_path
    )
    assert result.table.metric == "f1"
    assert AdapterStore(tmp_path / "store").verify() == []
