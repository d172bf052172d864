"""Masked language modelling task: which words were taken out of a text.

It needs no label, so an encoder may meet a catalogue first.

Owns the head, which words are asked for and what is shown in their place, the measures and the baselines. What such an
adapter is good for afterwards is for `tuning.continual` to know.

Source: Devlin et al. 2019, "BERT", section 3.1 and appendix A.1, for the task, the head and what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from peft_combo import metrics
from peft_combo.data.labels.tags import words_of
from peft_combo.data.labels.texts import split_texts
from peft_combo.data.task_data import texts_of
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.masked import MaskedHead
from peft_combo.encoder.tokens import Tokens
from peft_combo.errors import BackboneError
from peft_combo.metrics.report import Gain, ResultRow, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import MaskedTask
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation

# Texts whose states, and queries whose answers over the whole vocabulary, are held at once.
_TEXTS_AT_ONCE = 1024
_QUERIES_AT_ONCE = 256
# Seeds of what is asked of held-out texts: no run's own, so that all runs are asked the same.
_VALID, _TEST, _FIRST = 1, 2, 3
# What the head is fitted on before the encoder learns: so many queries, of so many drawings of words from a text at
# most; by so many steps between two looks at validation, and looks at most.
_FIRST_QUERIES = 12_288
_FIRST_DRAWINGS = 8
_FIRST_STEPS = 32
_FIRST_LOOKS = 30
_FIRST_RATE = 1e-3
_PSEUDO_COUNTS = (1.0, 0.1, 0.01, 1e-3, 1e-4)


class EncodeTokens(Protocol):
    """What `base.Encode` is for a task that is `retokenized`: it takes the ids to run as well."""

    def __call__(self, items: NDArray[np.int64], *, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Encode texts, ascending, with other tokens of theirs; see `base.RetokenizedBatch`."""


@dataclass(frozen=True)
class MaskedBatch:
    """Some texts with other words here and there.

    Attributes:
        items: (B,) the texts, ascending.
        tokens: (T,) ids to show, one text behind the other.
        places: (Q,) which of them are asked for. answers: (Q,) ids that stand there in truth.
    """

    items: NDArray[np.int64]
    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Masker:
    """Takes words out of texts.

    Attributes:
        tokens: of all texts. unit: (T,) number of the word that a token is a piece of, of the token itself where single
            pieces are masked, -1 for tokens that are never asked for; tokens of one unit stand side by side.
        ordinary: ids that may be shown in place of another.
    """

    tokens: Tokens
    unit: NDArray[np.int64]
    mask_id: int
    ordinary: NDArray[np.int64]

    @classmethod
    def of(cls, backbone: Backbone, texts: Sequence[str], max_length: int, *, whole_words: bool) -> Self:
        """Cut texts into pieces, and pieces into words.

        Raises:
            BackboneError: the tokenizer has no mask, or does not know where its tokens come from.
        """
        tokenizer = backbone.tokenizer
        if tokenizer.mask_token_id is None:
            raise BackboneError(
                f"The tokenizer of {backbone.name} has no mask token, which task.kind: masked shows in place of words. "
                "Take a model that was trained with one (BERT, RoBERTa, MPNet, ELECTRA and their kin)."
            )
        tokens = backbone.tokenize(texts, max_length)
        special = np.array(sorted(tokenizer.all_special_ids), np.int64)
        spans = np.array([span for own in backbone.pieces(texts, max_length) for span in own], np.int64).reshape(-1, 2)
        words = [words_of(text) for text in texts]
        # One line for all texts: where a text begins on it, no word or piece of another reaches.
        begin = np.cumsum([0, *(len(text) + 1 for text in texts)])[:-1]
        of_words = np.repeat(begin, [len(own) for own in words])[:, None]
        edges = np.array([span for own in words for span in own], np.int64).reshape(-1, 2) + of_words
        pieces = spans + np.repeat(begin, tokens.lengths)[:, None]
        unit = np.searchsorted(edges[:, 1], pieces[:, 0], side="right")  # the first word that ends behind its start
        inside = np.append(edges[:, 0], np.iinfo(np.int64).max)[unit] < pieces[:, 1]
        maskable = inside & (spans[:, 0] < spans[:, 1]) & ~np.isin(tokens.ids, special)
        if not whole_words:
            unit = np.arange(len(unit))
        known = np.unique(list(tokenizer.get_vocab().values()))
        return cls(tokens, np.where(maskable, unit, -1), int(tokenizer.mask_token_id), np.setdiff1d(known, special))

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the tokens of some texts stand among all tokens, text by text."""
        sizes = self.tokens.lengths[rows]
        return np.repeat(self.tokens.offsets[rows] - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))

    def mask(
        self, rows: NDArray[np.int64], share: float, random: float, kept: float, rng: np.random.Generator
    ) -> MaskedBatch:
        """Take words out of some texts: of each the nearest number to `share` of its words, and one at least.

        Args:
            rows: texts, ascending. random, kept: shares of what is asked for that show another token, or themselves.
        """
        own = self.places(rows)
        shown = self.tokens.ids[own].astype(np.int64)
        text = np.repeat(np.arange(len(rows)), self.tokens.lengths[rows])
        askable = np.flatnonzero(self.unit[own] >= 0)
        units, first, unit_of = np.unique(self.unit[own][askable], return_index=True, return_inverse=True)
        text_of = text[askable][first]
        order = np.lexsort((rng.random(len(units)), text_of))  # within each text at random
        count = np.bincount(text_of, minlength=len(rows))
        rank = np.arange(len(units)) - np.repeat(np.cumsum(count) - count, count)
        wanted = np.maximum(1, np.floor(share * count + 0.5))
        chosen = np.zeros(len(units), bool)
        chosen[order] = rank < wanted[text_of[order]]
        places = askable[chosen[unit_of]]
        targets = shown[places]
        dice = rng.random(len(places))
        others = rng.choice(self.ordinary, len(places))
        shown[places] = np.where(
            dice < kept, targets, np.where(dice < kept + random, others, self.mask_id)
        )  # fmt: skip
        return MaskedBatch(rows, shown, places, targets)


@dataclass(frozen=True)
class MaskedPredictions:
    """Predictions of the words of Q queries.

    Attributes:
        likelihood: (Q,) natural logarithm of the probability of the right word. ranks: (Q,) its rank, 1 = best.
    """

    likelihood: NDArray[np.float64]
    ranks: NDArray[np.float64]

    def values(self) -> dict[str, float]:
        mean = float(self.likelihood.mean())
        return {
            "log_likelihood": mean,
            "perplexity": float(np.exp(-mean)),
            "token_accuracy": float(metrics.per_query(self.ranks, "r@1").mean()),
            "top5_accuracy": float(metrics.per_query(self.ranks, "r@5").mean()),
        }


class MaskedWords:
    """The masked task as the loop sees it; see `base.Task`.

    Tuning starts from a head that was fitted over the frozen encoder until validation said stop, so what it is compared
    with is what the encoder knows already.
    """

    per_token = True
    retokenized = True
    brands = None
    exclusive = True
    unit = "texts"
    protocol = (
        "Texts of the catalogue alone; no label is read. Words masked in test texts, none of which (but for case and "
        "spaces) is in training or validation; the same words for every run, each token of them replaced by the mask. "
        "Log-likelihood in nats a token over the whole vocabulary; perplexity is its exponential. Step and first head "
        "were chosen on the validation texts; 95 % interval by bootstrap over texts, p by exchanging texts. Texts are "
        "divided by themselves: an item that another task holds out may be read here, without anything told of it."
    )

    def __init__(self, recipe: Recipe, config: MaskedTask) -> None:
        self._config = config
        self._seed = recipe.seed
        found = texts_of(recipe.data, config)
        self.texts = list(found.texts)
        parts = split_texts(self.texts, recipe.data)
        self._train, self._valid, self._test = parts.train, parts.valid, parts.test
        self._epochs = Epochs(len(self._train), recipe.training.batch_size, recipe.seed)
        self.notes = list(found.notes)
        self.examples = {"train": len(self._train), "valid": len(self._valid), "test": len(self._test)}
        self.data = {
            "name": found.name,
            "digest": found.digest,
            "split_digest": parts.digest,
            "texts": self.examples,
        }

    @property
    def per_epoch(self) -> int:
        return self._epochs.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> MaskedHead:
        self._masker = Masker.of(backbone, self.texts, max_length, whole_words=self._config.whole_words)
        self._words: Tensor = backbone.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        vocabulary, width = self._words.shape
        head = MaskedHead(backbone.dim, width, vocabulary, self._config)
        if not self._words.is_meta:  # shapes alone have no size
            head.size.copy_(torch.linalg.vector_norm(self._words) / self._words.numel() ** 0.5)
        return head

    def start(self, head: MaskedHead, frozen: Encode) -> None:
        some = self._train
        if len(some) > _FIRST_QUERIES:
            some = np.sort(np.random.default_rng(_FIRST).choice(some, _FIRST_QUERIES, replace=False))
        states, targets = [], np.empty(0, np.int64)
        for drawing in range(_FIRST_DRAWINGS):
            queries = self._mask_words(some, _FIRST + drawing)
            states.append(self._states(frozen, queries))
            targets = np.concatenate([targets, queries.targets])
            if len(targets) >= _FIRST_QUERIES:
                break
        held = self._mask_words(self._valid, _VALID)
        with torch.no_grad():
            head.bias.copy_(torch.from_numpy(np.log(self._frequencies(held.targets))))
        fit_head(head, self._words, (torch.cat(states), targets), (self._states(frozen, held), held.targets))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> MaskedBatch:
        rows = self._train[np.sort(self._epochs.share(step, part, parts))]
        config, rng = self._config, np.random.default_rng([self._seed, step, part])
        return self._masker.mask(rows, config.mask_share, config.random_share, config.kept_share, rng)

    def logits(self, head: MaskedHead, encoded: Tensor, batch: MaskedBatch) -> Tensor:
        logits: Tensor = head(encoded[torch.from_numpy(batch.places).to(encoded.device)], self._words)
        return logits

    def loss(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        return functional.cross_entropy(logits.float(), torch.from_numpy(batch.targets).to(logits.device))

    def evaluate(self, head: MaskedHead, encode: Encode, metric: str) -> Evaluation:
        values = self._predict(head, encode, self._mask_words(self._valid, _VALID)).values()
        return Evaluation({name: values[name] for name in self._config.metrics})

    def apply_choice(self, head: MaskedHead, choice: Mapping[str, float]) -> None:
        pass

    def predict(self, head: MaskedHead, encode: Encode) -> MaskedPredictions:
        return self._predict(head, encode, self._mask_words(self._test, _TEST))

    def table(self, before: MaskedPredictions, after: MaskedPredictions) -> ResultTable:
        valid, test = self._mask_words(self._valid, _VALID), self._mask_words(self._test, _TEST)
        often = self._frequencies(valid.targets)
        predictions = {
            "how often a word occurs": _rank_targets(
                np.broadcast_to(np.log(often), (len(test.targets), len(often))), test.targets
            ),
            "frozen backbone": before,
            "tuned": after,
        }
        text_of_query = np.searchsorted(np.cumsum(self._masker.tokens.lengths[test.items]), test.places, side="right")
        rows = tuple(
            ResultRow(name, one.values(), metrics.bootstrap_interval(one.likelihood, text_of_query))
            for name, one in predictions.items()
        )
        n = len(test.items)
        return ResultTable(
            "log_likelihood", rows, Gain.between(before.likelihood, after.likelihood, text_of_query),
            len(test.targets), n,
            asked=f"the {len(test.targets):,} masked tokens of {n:,} held-out test texts",
            caveat=f"Step and first head were chosen on {len(valid.items):,} validation texts; no test text occurs in "
            "training or validation. What this is worth to another task shows only there.",
        )  # fmt: skip

    def _mask_words(self, rows: NDArray[np.int64], seed: int) -> MaskedBatch:
        """Ask what stands in some texts, whoever runs."""
        # Nothing but the mask: what shows itself would be no question.
        return self._masker.mask(rows, self._config.mask_share, 0.0, 0.0, np.random.default_rng(seed))

    def _frequencies(self, held: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how likely each word is by itself: (V,)."""
        own = self._masker.places(self._train)
        seen = self._masker.tokens.ids[own[self._masker.unit[own] >= 0]]
        return estimate_frequencies(np.bincount(seen, minlength=len(self._words)), held)

    def _states(self, encode: Encode, queries: MaskedBatch) -> Tensor:
        """Encode what is asked for: (Q, D)."""
        sizes = self._masker.tokens.lengths[queries.items]
        begin = np.concatenate([[0], np.cumsum(sizes)])
        found = []
        for start in range(0, len(queries.items), _TEXTS_AT_ONCE):
            low, high = begin[start], begin[min(start + _TEXTS_AT_ONCE, len(queries.items))]
            some = queries.items[start : start + _TEXTS_AT_ONCE]
            places = queries.places[(queries.places >= low) & (queries.places < high)] - low
            states = cast(EncodeTokens, encode)(some, tokens=queries.tokens[low:high])
            found.append(torch.from_numpy(states[places]))
        return torch.cat(found)

    @torch.inference_mode()
    def _predict(self, head: MaskedHead, encode: Encode, queries: MaskedBatch) -> MaskedPredictions:
        return predict_words(head, self._words, self._states(encode, queries), queries.targets)


@torch.inference_mode()
def predict_words(head: MaskedHead, words: Tensor, states: Tensor, targets: NDArray[np.int64]) -> MaskedPredictions:
    """Let a head answer: (Q, D) states."""
    found = []
    for start in range(0, len(targets), _QUERIES_AT_ONCE):
        some = states[start : start + _QUERIES_AT_ONCE].to(words.device)
        logits = head(some, words).float().log_softmax(-1).cpu().numpy()
        found.append(_rank_targets(logits, targets[start : start + _QUERIES_AT_ONCE]))
    return _join_predictions(found)


def fit_head(
    head: MaskedHead, words: Tensor, seen: tuple[Tensor, NDArray[np.int64]], held: tuple[Tensor, NDArray[np.int64]]
) -> None:
    """Fit a head over states that do not change, for as long as the likelihood of held-out words rises.

    Args:
        words: (V, E) word embeddings. seen, held: (Q, D) states and (Q,) the words that stood there.
    """
    states, targets = seen[0].to(words.device), torch.from_numpy(seen[1]).to(words.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_FIRST_RATE)
    best = (float(predict_words(head, words, *held).likelihood.mean()), _copy_weights(head))
    examples = Epochs(len(targets), _QUERIES_AT_ONCE, _FIRST)
    stride = max(_FIRST_STEPS, examples.per_epoch)
    for look in range(_FIRST_LOOKS):
        for step in range(look * stride, (look + 1) * stride):
            some = torch.from_numpy(examples.share(step)).to(words.device)
            loss = functional.cross_entropy(head(states[some], words), targets[some])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        value = float(predict_words(head, words, *held).likelihood.mean())
        if value <= best[0]:
            break
        best = (value, _copy_weights(head))
    head.load_state_dict(best[1])
    head.zero_grad(set_to_none=True)


def _copy_weights(head: MaskedHead) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}


def _rank_targets(likelihoods: NDArray[np.floating[Any]], targets: NDArray[np.int64]) -> MaskedPredictions:
    """Judge (Q, V) logarithms of probabilities."""
    likelihood = np.take_along_axis(likelihoods, targets[:, None], axis=1)[:, 0].astype(np.float64)
    return MaskedPredictions(likelihood, metrics.midranks(likelihoods, targets))


def _join_predictions(parts: Sequence[MaskedPredictions]) -> MaskedPredictions:
    return MaskedPredictions(
        np.concatenate([one.likelihood for one in parts]), np.concatenate([one.ranks for one in parts])
    )


def estimate_frequencies(counts: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the probability of each word from how often it was seen, with the pseudo-count that suits `held` best.

    Args:
        counts: (V,) occurrences in training. held: (Q,) words of validation.
    """
    tried = [(counts + more) / (counts.sum() + more * len(counts)) for more in _PSEUDO_COUNTS]
    return max(tried, key=lambda one: float(np.log(one[held]).sum()))
