"""Masked words: what is asked and shown, what an answer costs, and what a run learns from texts alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import build_encoder
from torch.nn import functional

from peft_combo.callbacks import RunCallback
from peft_combo.data.task_data import check_data, describe_data
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.masked import MaskedHead
from peft_combo.encoder.methods import attach
from peft_combo.errors import BackboneError, DataError, RecipeError
from peft_combo.recipe.adapter import LoraAdapter
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import MaskedTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.loop import Interrupted, tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.masked import (
    MaskedBatch,
    MaskedWords,
    Masker,
    estimate_frequencies,
    fit_head,
    predict_words,
)

MakeRecipe = Callable[..., Recipe]
MASK, FIRST_WORD = 4, 5  # ids of the tiny tokenizer: [PAD] [UNK] [CLS] [SEP] [MASK] w0 w1 ...
TEXTS = ["w1 w2-w3 w4 w5", "w6 zzz w7", "w8 w9 w10 w11 w12 w13 w14 w15"]


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=16)


@pytest.fixture(scope="module")
def texts_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with items and nothing else: each title has six of the twelve words of its style, one of two."""
    folder = tmp_path_factory.mktemp("texts-alone")
    dice = np.random.default_rng(3)
    titles = [" ".join(f"w{style * 12 + n}" for n in dice.permutation(12)[:6]) for style in dice.integers(0, 2, 180)]
    (folder / "items.csv").write_text("item_id,title\n" + "\n".join(f"i{n},{t}" for n, t in enumerate(titles)))
    return folder


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, texts_alone: Path) -> MakeRecipe:
    def make(method: str = "lora", **changes: Any) -> Recipe:
        given: dict[str, Any] = {
            "task": {"kind": "masked"}, "category": "tiny-text", "data.path": str(texts_alone), "training.epochs": 1,
        }  # fmt: skip
        return tiny_recipe(method, **{**given, **changes})

    return make


def mask(masker: Masker, share: float, seed: int = 0, random: float = 0.0, kept: float = 0.0) -> MaskedBatch:
    rows = np.arange(len(masker.tokens))
    return masker.mask(rows, share, random, kept, np.random.default_rng(seed))


# --- what is asked, and what is shown ---------------------------------------------------------------------------------


def test_pieces_of_a_word_are_one_unit_and_what_is_no_word_is_none(backbone: Backbone) -> None:
    masker = Masker.of(backbone, TEXTS, 16, whole_words=True)
    ids = masker.tokens.ids
    # [CLS] w1 w2 - w3 w4 w5 [SEP]: the tokenizer cuts the hyphened word, and does not know the hyphen.
    assert ids[:8].tolist() == [2, 6, 7, 1, 8, 9, 10, 3]
    first = masker.unit[:8]
    assert first[[0, 3, 7]].tolist() == [-1, -1, -1]
    assert first[2] == first[4]
    assert len(set(first[[1, 2, 5, 6]].tolist())) == 4
    second = masker.unit[8:13]
    assert second[[0, 2, 4]].tolist() == [-1, -1, -1]  # zzz is [UNK]: nothing to answer
    by_piece = Masker.of(backbone, TEXTS, 16, whole_words=False).unit
    assert (by_piece >= 0).tolist() == (masker.unit >= 0).tolist()
    assert len(set(by_piece[by_piece >= 0].tolist())) == int((by_piece >= 0).sum())


def test_the_share_is_of_words_and_every_text_is_asked(backbone: Backbone) -> None:
    masker = Masker.of(backbone, TEXTS, 16, whole_words=True)
    for seed in range(20):
        asked = mask(masker, 0.3, seed)
        owner = np.searchsorted(np.cumsum(masker.tokens.lengths), asked.places, side="right")
        units = [len(set(masker.unit[asked.places[owner == text]].tolist())) for text in range(3)]
        assert units == [1, 1, 2]  # of 4, 2 and 8 words
        w2, w3 = (place in asked.places for place in (2, 4))
        assert w2 == w3  # one word


def test_only_what_is_asked_for_changes_and_the_answer_is_what_stood_there(backbone: Backbone) -> None:
    masker = Masker.of(backbone, TEXTS, 16, whole_words=True)
    asked = mask(masker, 0.5)
    assert asked.targets.tolist() == masker.tokens.ids[asked.places].tolist()
    assert set(asked.tokens[asked.places].tolist()) == {MASK}
    rest = np.setdiff1d(np.arange(len(asked.tokens)), asked.places)
    assert (asked.tokens[rest] == masker.tokens.ids[rest]).all()
    # A part of the texts: places count within what is shown.
    part = masker.mask(np.array([0, 2]), 0.5, 0.0, 0.0, np.random.default_rng(0))
    assert len(part.tokens) == 8 + 10
    assert (masker.tokens.ids[np.r_[0:8, 13:23]][part.places] == part.targets).all()


def test_eight_in_ten_show_the_mask_one_another_word_and_one_itself(backbone: Backbone) -> None:
    texts = [" ".join(f"w{(text * 7 + word) % 195}" for word in range(14)) for text in range(2000)]
    masker = Masker.of(backbone, texts, 16, whole_words=True)
    asked = mask(masker, 0.5, random=0.1, kept=0.1)
    shown = asked.tokens[asked.places]
    assert len(shown) == 2000 * 7
    # Of the words drawn at random one in 195 is the word itself.
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == asked.targets).mean() == pytest.approx(0.1 + 0.1 / 195, abs=0.01)
    assert ((shown != MASK) & (shown != asked.targets)).mean() == pytest.approx(0.1, abs=0.01)
    assert shown[shown != MASK].min() >= FIRST_WORD  # a special token is neither asked for nor shown
    assert asked.targets.min() >= FIRST_WORD


def test_masks_are_a_function_of_seed_and_step(recipe: MakeRecipe, backbone: Backbone) -> None:
    def batches(seed: int) -> list[MaskedBatch]:
        task = build_task(recipe(seed=seed))
        task.head(backbone, 16)
        return [task.batch(step) for step in (0, 1, task.per_epoch)]

    one, again, other = batches(0), batches(0), batches(1)
    for first, second in zip(one, again, strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        assert (np.diff(first.items) > 0).all()  # distinct and ascending, as the encoder wants them
    assert one[0].tokens.tolist() != other[0].tokens.tolist()
    # Held-out texts are asked the same by every run, and nothing is shown there but the mask.
    tasks = [build_task(recipe(seed=seed)) for seed in (0, 1)]
    for task in tasks:
        task.head(backbone, 16)
    held = [task._mask_words(task._valid, 1) for task in tasks if isinstance(task, MaskedWords)]
    assert held[0].tokens.tolist() == held[1].tokens.tolist()
    assert set(held[0].tokens[held[0].places].tolist()) == {MASK}


def test_an_encoder_runs_the_tokens_it_is_shown(backbone: Backbone) -> None:
    attached = attach(
        backbone.model,
        LoraAdapter(rank=2, top_layers=1),
        max_length=16,
        total_steps=1,
        seed=0,
        tokenizer=backbone.tokenizer,
    )
    items = ItemEncoder(backbone, attached, TEXTS, per_token=True, retokenized=True)
    masker = Masker.of(backbone, TEXTS, 16, whole_words=True)
    asked = mask(masker, 0.5)
    states = items.catalogue(items.frozen, asked.items, tokens=asked.tokens)
    with torch.no_grad():
        for row in range(3):
            own = slice(masker.tokens.offsets[row], masker.tokens.offsets[row + 1])
            alone = backbone.model(input_ids=torch.from_numpy(asked.tokens[own])[None]).last_hidden_state[0].numpy()
            assert np.allclose(states[own], alone, atol=1e-5)
        first = backbone.model.get_input_embeddings()(torch.from_numpy(asked.tokens[:8]))  # type: ignore[operator]
        selection = items.select(asked.items, asked.tokens)
        entering, text = items.entering_states(selection)
        assert torch.allclose(entering[text == 0], first, atol=1e-5)
        again = items.encode_selection(items.frozen, replace(selection, added=torch.zeros_like(entering))).numpy()
        assert np.allclose(states, again, atol=1e-5)  # what is pushed is what is shown


# --- what an answer costs ---------------------------------------------------------------------------------------------


def test_an_untrained_head_says_how_often_words_occur_and_a_loss_by_hand() -> None:
    head = MaskedHead(2, 3, 4, MaskedTask())
    words = torch.randn(4, 3)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    head.bias.data.copy_(shares.log())
    assert torch.allclose(head(torch.randn(5, 2), words).softmax(-1), shares.expand(5, 4))
    # The transform by hand: the identity, GELU, a layer norm of scale one.
    torch.nn.init.ones_(head.norm.weight)
    state = torch.tensor([[1.0, -2.0]])
    bent = functional.gelu(torch.tensor([1.0, -2.0, 0.0]))
    normed = (bent - bent.mean()) / (bent.var(unbiased=False) + 1e-5).sqrt()
    logits = head(state, words).detach()
    assert torch.allclose(logits[0], words @ normed + shares.log(), atol=1e-5)
    answers = predict_words(head, words, state, np.array([2]))
    assert answers.likelihood[0] == pytest.approx(float(logits[0].log_softmax(0)[2]), abs=1e-5)
    assert answers.ranks[0] == 1 + int((logits[0] > logits[0, 2]).sum())
    assert answers.values()["perplexity"] == pytest.approx(float(np.exp(-answers.likelihood[0])))


def test_a_fitted_head_is_never_worse_on_what_is_held_out_and_learns_what_there_is() -> None:
    dice = np.random.default_rng(0)
    words = torch.eye(6)
    answers = dice.integers(0, 6, 300)
    states = torch.from_numpy((4 * np.eye(6)[answers] + dice.normal(size=(300, 6))).astype(np.float32))
    head = MaskedHead(6, 6, 6, MaskedTask())
    fit_head(head, words, (states[:200], answers[:200]), (states[200:], answers[200:]))
    assert predict_words(head, words, states[200:], answers[200:]).values()["token_accuracy"] > 0.9
    noise = MaskedHead(6, 6, 6, MaskedTask())
    nothing = torch.from_numpy(dice.normal(size=(300, 6)).astype(np.float32))
    before = predict_words(noise, words, nothing[200:], answers[200:]).likelihood.mean()
    fit_head(noise, words, (nothing[:200], answers[:200]), (nothing[200:], answers[200:]))
    assert predict_words(noise, words, nothing[200:], answers[200:]).likelihood.mean() >= before


def test_frequencies_by_hand() -> None:
    counts = np.array([3, 1, 0, 0])
    # With a word that was never seen, the largest pseudo-count is the most probable; with seen ones, the smallest.
    assert estimate_frequencies(counts, np.array([2])).tolist() == pytest.approx([4 / 8, 2 / 8, 1 / 8, 1 / 8])
    assert estimate_frequencies(counts, np.array([0, 0, 0, 1])) == pytest.approx([0.75, 0.25, 0, 0], abs=1e-3)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_it_learns_what_a_text_is_about_from_items_alone(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(
        **{
            "adapter": {"method": "lora", "rank": 8, "top_layers": 2, "targets": "attention+ffn"},
            "training.epochs": 10, "training.learning_rate": 1e-2, "training.early_stopping": {"patience": 20},
        }
    )  # fmt: skip
    result = tune(made, run_folder=tmp_path / "run")
    table = result.table
    assert [row.name for row in table.rows] == [
        "how often a word occurs",
        "frozen backbone",
        "tuned",
    ]
    often, frozen, tuned = (row.values["log_likelihood"] for row in table.rows)
    assert often == pytest.approx(-np.log(24), abs=0.1)
    assert tuned > often + 0.1  # the words around it give the style away, and with it half of the words
    assert table.gain.value == pytest.approx(tuned - frozen)
    assert table.gain.interval[0] > 0
    manifest = result.record.manifest
    assert manifest.task["kind"] == "masked"
    assert "no label is read" in str(manifest.metrics["protocol"])
    # The word embeddings are the encoder's own: neither trained nor stored.
    live = AdapterBank(Backbone.of(made.backbone), AdapterStore(made.store)).get("tiny-text")
    head = live.head_as(MaskedHead)
    assert {name: tuple(own.shape) for name, own in head.state_dict().items()} == {
        "dense.weight": (32, 32), "dense.bias": (32,), "norm.weight": (32,), "norm.bias": (32,), "bias": (200,),
        "size": (),
    }  # fmt: skip
    assert load_head(head.spec(), head.state_dict()).spec() == head.spec()


class _Stopping(RunCallback):
    def on_step_end(self, step: int, loss: float) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_repeats_the_uninterrupted_one(recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = tune(recipe(), run_folder=tmp_path / "whole")
    with pytest.raises(Interrupted):
        tune(recipe(), run_folder=tmp_path / "halved", callback=_Stopping())
    rest = tune(recipe(), run_folder=tmp_path / "halved", resume=True)
    assert rest.losses == whole.losses
    assert rest.table.after == whole.table.after


def test_what_cannot_be_masked_is_refused(recipe: MakeRecipe, tmp_path: Path, texts_alone: Path) -> None:
    with pytest.raises(RecipeError, match=r"task.kind masked labels single words"):
        recipe(augmentation={"word_drop": 0.1})
    with pytest.raises(RecipeError, match=r"task.kept_share: expected less than 1 together with task.random_share"):
        recipe(task={"kind": "masked", "random_share": 0.5, "kept_share": 0.5})
    (tmp_path / "items.csv").write_text("item_id,title\na,w1\nb,w2\n")
    with pytest.raises(DataError, match=r"None of the 2 texts .* has 2 words"):
        build_task(recipe(**{"data.path": str(tmp_path)}))
    folder = build_encoder(tmp_path / "maskless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}))
    with pytest.raises(BackboneError, match="has no mask token"):
        build_task(recipe()).head(Backbone.load(str(folder), max_length=16), 16)


def test_the_texts_of_a_catalogue_are_described_without_labels(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,title\na,w1 w2\nb,W1  w2\nc,w3\n" + "".join(f"d{n},w{n} w9\n" for n in range(40))
    )
    data = recipe(**{"data.path": str(tmp_path)}).data
    assert check_data(data, MaskedTask()) == []
    (told_of,) = describe_data(data, MaskedTask())
    assert told_of["texts"] == 41
    assert told_of["split"]["by"] == "text"
    assert told_of["notes"][-2:] == ["43 texts are 42 distinct ones", "1 texts of a single word were left out"]
