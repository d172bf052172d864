"""The bundle recommender: what the tuned encoder knows of texts and what counting knows of behaviour, in one answer.

Owns how the contenders are weighed without looking at held-out bundles, how they are fitted anew for serving, and the
border where outside ids become rows and back. Knows nothing of how an adapter was tuned, or of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.labels.tags import Tagger, head_entity
from peft_combo.data.leakage import rating_problem
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Questions
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError, did_you_mean
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.evidence import Composition, co_counts
from peft_combo.recommender.composing.fit_weights import fit_weights
from peft_combo.recommender.composing.options import Options, Weights, Wished
from peft_combo.recommender.composing.slots import SlotTemplates
from peft_combo.recommender.fit_data import Known, text_knowledge
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead, FittedPast, beside, fused, past_of
from peft_combo.recommender.fusion import Fusion, comparable
from peft_combo.recommender.model_selection import (
    ALIKE,
    BY_CATEGORY,
    ENSEMBLE,
    RANDOM,
    TUNED,
    asked,
    best_text,
    families,
    picked_all,
)
from peft_combo.recommender.query import Wish, same_thing, understand
from peft_combo.recommender.results import Recommendation, Suggestion

# A user is described by so many of the items taken last; older ones say more about a past than about a next purchase.
_HISTORY = 5
# Validation questions that settings and weights are chosen on.
_QUESTIONS = 2_000
# Items whose titles are read for a wish: so many most like its words, and so many most like its name alone.
_READ = 128


@dataclass(frozen=True, eq=False)
class _Answers:
    """The items that answer a wish, the likest first, and the cosine of every item with its words (N,).

    Attributes:
        named: whether the items are called as the wish is; where none is, those of its type answer.
    """

    wish: Wish
    named: bool
    rows: NDArray[np.int64]
    likeness: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Judged:
    """Fused scores (N,) for one question, and what each scorer gave."""

    scores: NDArray[np.float32]
    parts: dict[str, NDArray[np.float32]]

    def shares(self, row: int) -> dict[str, float]:
        """Return what each scorer adds to an item's score; the sum is the score."""
        shares = {name: float(part[row]) for name, part in self.parts.items()}
        rest = float(self.scores[row]) - sum(shares.values())
        return {**shares, ALIKE: rest} if abs(rest) > 1e-4 else shares


class BundleRecommender:
    """Ranks, completes and composes bundles for items, a user or a text; safe to share between threads.

    Attributes:
        dataset: what it was fitted on.
        adapters: the adapters that make item vectors, as they were when it was fitted; none for the frozen encoder.
        fusion: how scorers are weighed, with the validation table behind the choice.
        settings: of each scorer the fusion needs, and of the text side, the setting that validation picked.
        serving: the scorers the fusion needs, fitted on all bundles.
        text_side: judges how well an item goes with a set by its text alone; its name is "" for the frozen encoder.
        weights: of a composed bundle's objective, as validation chose them.
        known: what they were fitted on. users: what reads the past of users alike, where the fusion could not weigh it.
        text: template of the items' texts. split_digest: of the split that settings and weights were chosen on.
        notes: what was left out, and why.
    """

    def __init__(
        self, dataset: Dataset, bank: AdapterBank, adapters: Sequence[LiveAdapter], serving: Mapping[str, Fitted],
        text_side_name: str, text_side: Fitted, fusion: Fusion, settings: Mapping[str, str], known: Known,
        users: FittedPast | None, weights: Weights, split_digest: str, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        assert known.frozen is not None
        self.dataset = dataset
        self.bank = bank
        self.adapters = tuple(adapters)
        self.fusion = fusion
        self.settings = dict(settings)
        self.notes = tuple(notes)
        self.templates = SlotTemplates.learn(dataset.catalog, dataset.bundles.items)
        self.serving, self.known, self.users = dict(serving), known, users
        self.text_side_name, self.text_side = text_side_name, text_side
        self.text, self.split_digest = known.text, split_digest
        self.weights = weights
        self._frozen = known.frozen
        self._history: Any = sparse.csc_array(known.history)
        self._composer = Composer(
            dataset.catalog, self.templates, vectors=self._frozen, history=known.history, weights=weights
        )
        self._user_rows = (
            {} if dataset.interactions is None else {u: r for r, u in enumerate(dataset.interactions.user_ids)}
        )
        self._prices = [None if np.isnan(price) else float(price) for price in dataset.catalog.prices]

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        parts: Split,
        bank: AdapterBank,
        adapters: str | Sequence[str] | None,
        *,
        text: str = "{title}",
        seed: int = 0,
        cache: VectorCache | None = None,
        progress: Callable[[int], None] | None = None,
        done: Callable[[str], None] | None = None,
    ) -> Self:
        """Choose settings and fusion on the validation bundles, then learn from all bundles.

        Weights are fitted while the scorers know training bundles only, as they will meet new ones; for serving the
        scorers are fitted once more on every bundle there is. Test bundles therefore serve but never choose. What is
        weighed is what `evaluation.evaluate` measures.

        Args:
            adapters: ``"fashion"`` or ``"fashion@v2"``, or several: adapters tuned on one category speak of its items,
                one tuned on all categories speaks of all (see `categories`). None for the frozen encoder.
            text: template of the items' texts; that of the adapters' recipe.
            cache: keeps encoded catalogues on disk.
            progress: told how many texts were encoded. done: told the name of each scorer that is fitted.
        Raises:
            StoreError: an adapter cannot be had.
            DataError: no validation bundle to fit the fusion on, or the adapters do not go together.
        """
        if not len(parts.valid):
            raise DataError(
                f"{dataset.name!r} has no validation bundle to weigh the scorers on. Raise data.valid_fraction."
            )
        side = text_knowledge(dataset, bank, adapters, text, cache, progress)
        notes = [
            f"{one.reference} was tuned on another split, so it may have seen the validation bundles and weigh too much"
            for one in side.live
            if one.reference in side.tuned
            and one.record.manifest.data.split_digest != parts.digest
            and side.areas is None
        ]
        manifests = (one.record.manifest for one in side.live if one.reference in side.rated)
        notes += [problem for manifest in manifests if (problem := rating_problem(manifest, dataset, parts))]
        known = Known.of(
            dataset, parts.train, parts.train_interactions, text, side.frozen, side.tuned, side.areas, side.rated
        )
        valid = asked(dataset, parts.valid, _QUESTIONS, seed, "valid", notes)
        owners = {dataset.bundles.groups[row] for row in parts.valid}
        contenders = {name: choices for name, choices in families(known, owners, seed).items() if name != RANDOM}
        picked = picked_all(contenders, valid, known, seed, done or (lambda name: None), notes)
        scores = {name: one.scores for name, one in picked.items()}
        fusion = Fusion.fit(scores, valid.targets, known.evidence(valid), valid.clusters, seed=seed)
        scores.clear()

        name = best_text(picked)
        text_side = picked[name].fitted if name else FittedHead.untuned(side.frozen)
        templates = SlotTemplates.learn(dataset.catalog, [dataset.bundles.items[row] for row in parts.train])
        weights = fit_weights(
            Composer(dataset.catalog, templates), valid,
            fused(fusion, {name: one.fitted for name, one in picked.items()}, known), text_side, seed=seed,
        )  # fmt: skip

        everything = Known.of(dataset, None, None, text, side.frozen, side.tuned, side.areas, side.rated)
        wanted = {name: picked[name].setting for name in fusion.needs}
        serving = fitted_as(everything, wanted, seed, {name: picked[name].fitted for name in wanted})
        # What was not weighed, because no validation user was met before, still speaks for a user who is known.
        weighed = not known.user_rows.keys().isdisjoint(owners)
        if name:
            wanted = {**wanted, name: picked[name].setting}
        return cls(
            dataset, bank, side.live, serving, name, text_side, fusion, wanted, everything,
            None if weighed or not everything.user_rows else past_of(everything, neighbours=True), weights,
            parts.digest, notes,
        )  # fmt: skip

    def complete(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        k: int = 10,
        constraints: Constraints | None = None,
        explain: bool = False,
    ) -> list[Suggestion]:
        """Return the items that best complete a bundle.

        Args:
            items: outside ids of what is there; may be empty where a user is given.
            user: outside id; without items the ones this user took last are the context.
            k: at most so many.
            explain: also tell what each given item adds; costs one more scoring for each.
        Raises:
            DataError: an id is not known, or there is nothing to go by.
        """
        context = self._rows(items)
        base = context if len(context) else self._taken_last(user)
        judged = self._judged(base, user)
        scores = judged.scores
        allowed = self._composer.allowed_items(constraints or Constraints()) & np.isfinite(scores)
        allowed[context] = False
        candidates = np.flatnonzero(allowed)
        first = candidates[_largest(scores[candidates], k)]
        because = self._because(base, user, first, scores) if explain and len(base) > 1 else {}
        return [
            self._suggestion(int(row), float(scores[row]), judged.shares(int(row)), base, because.get(int(row), {}))
            for row in first
        ]

    def compose(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        query: str | None = None,
        tagger: Tagger | None = None,
        constraints: Constraints | None = None,
        required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None,
        options: Options | None = None,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Return bundles that hold `items`, or new ones for a user or a text.

        Relevance is the fused score beside the items (or what the user took last), plus the user's neighbours, plus
        the likeness to the text; compatibility of an item with the rest of a bundle is the tuned encoder's.

        Args:
            items: outside ids every bundle keeps.
            query: what is looked for, in words.
            tagger: takes the query apart (`wishes.understand`): every bundle then holds one item for each thing it
                names and the catalogue has, found by the words on that thing, and a budget it states counts where the
                constraints have none. None compares items with the query as a whole; so do substitutes.
            required, forbidden: names of slots.
            explain: also tell what each item of a bundle adds to the others.
        Raises:
            DataError: an id or slot is not known, nothing is given to go by, or no bundle meets the constraints.
        """
        context = self._rows(items)
        if not (len(context) or user is not None or query is not None):
            raise DataError("Nothing to go by: give items, a user or a query.")
        judged = None
        if len(context) or user is not None:
            judged = self._judged(context if len(context) else self._taken_last(user), user)
        parts = [] if judged is None else [judged.scores]
        answers: list[_Answers] = []
        if query is not None:
            if tagger is not None:
                understood = understand(query, tagger)
                constraints, query = _within(constraints or Constraints(), understood.budget), understood.text
                if options is None or options.mode == "complement":
                    answers = self._answers(understood.wishes, tagger)
            parts.append(_answered(self._likeness(query), answers))
        composer = self._composer
        if required is not None or forbidden is not None:
            edited = self.templates.with_rules(required=required, forbidden=forbidden)
            composer = composer.with_templates(edited)
        found = composer.compose(
            context, wished=[Wished(one.wish.name, one.rows) for one in answers], relevance=_summed(parts),
            compatibility=self._beside, constraints=constraints, options=options,
        )  # fmt: skip
        return [self._recommendation(one, judged, explain, answers) for one in found]

    def rank(
        self,
        bundles: Sequence[Sequence[str]],
        *,
        items: Sequence[str] = (),
        user: str | None = None,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Score given bundles with the composer's objective, best first.

        Args:
            bundles: outside ids; each holds `items` and at least one more.
            user: for whom; None judges by how well the items go together.
            explain: as for `compose`.
        Raises:
            DataError: an id is not known.
        """
        context = self._rows(items)
        judged = None
        if len(context) or user is not None:
            judged = self._judged(context if len(context) else self._taken_last(user), user)
        ranked = self._composer.rank(
            [self._rows(bundle) for bundle in bundles], context=context,
            relevance=None if judged is None else judged.scores, compatibility=self._beside,
        )  # fmt: skip
        return [self._recommendation(one, judged, explain) for one in ranked]

    def search(self, query: str, k: int = 10) -> list[tuple[str, float]]:
        """Return the items whose text is most like `query`, with the cosine of the frozen encoder."""
        scores = self._likeness(query)
        return [
            (self.dataset.catalog.item_ids[row], float(scores[row])) for row in np.argsort(-scores, kind="stable")[:k]
        ]

    # Rows and scores from here on.

    def _rows(self, items: Sequence[str]) -> NDArray[np.int64]:
        index = self.dataset.catalog.index
        for item in items:
            if item not in index:
                close = did_you_mean(item, index)
                raise DataError(f'No item "{item}" among the {len(index):,} of {self.dataset.name}. {close}'.rstrip())
        return np.array(list(dict.fromkeys(index[item] for item in items)), np.int64)

    def _taken_last(self, user: str | None) -> NDArray[np.int64]:
        """Return the items a user took last, as the context they stand for."""
        if user is None:
            raise DataError("Nothing to go by: give items or a user.")
        row = self._user_row(user)
        interactions = self.dataset.interactions
        assert interactions is not None
        mine = np.flatnonzero(interactions.users == row)
        order = mine[np.argsort(np.nan_to_num(interactions.times[mine]), kind="stable")[::-1]]
        return np.array(list(dict.fromkeys(interactions.items[order].tolist()))[:_HISTORY], np.int64)

    def _user_row(self, user: str) -> int:
        if user not in self._user_rows:
            close = did_you_mean(user, self._user_rows)
            raise DataError(
                f'No user "{user}" among the {len(self._user_rows):,} of {self.dataset.name}. {close}'.rstrip()
            )
        return self._user_rows[user]

    def _question(self, context: NDArray[np.int64], user: str | None) -> Questions:
        if user is not None:
            self._user_row(user)
        none = np.zeros(1, np.int64)
        return Questions(context[None], none, np.array([user or ""]), none)

    def _scores(self, questions: Questions) -> dict[str, NDArray[np.float32]]:
        return {name: self.serving[name](questions) for name in self.fusion.needs}

    def _fused(self, questions: Questions) -> NDArray[np.float32]:
        fused = self.fusion.combine(self._scores(questions), self.known.evidence(questions))
        return self._for_user(fused, questions)

    def _judged(self, context: NDArray[np.int64], user: str | None) -> _Judged:
        questions = self._question(context, user)
        fused, parts = self.fusion.explained(self._scores(questions), self.known.evidence(questions))
        scores: NDArray[np.float32] = self._for_user(fused, questions)[0]
        return _Judged(scores, {name: part[0] for name, part in parts.items()})

    def _for_user(self, scores: NDArray[np.float32], questions: Questions) -> NDArray[np.float32]:
        """Add what users alike took to fused scores (Q, N), where the fusion could not weigh that itself."""
        if self.users is None or not any(questions.clusters):
            return scores
        evidence = self.known.evidence(questions)
        neighbours, heard = comparable(self.users(questions), evidence, self.fusion.form)
        # Not a weight that was fitted: the same voice as any one scorer. What neighbours cannot say changes nothing.
        return np.where(heard, scores + neighbours, scores).astype(np.float32)

    def _because(
        self, context: NDArray[np.int64], user: str | None, rows: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> dict[int, dict[str, float]]:
        """Tell what each item of a context adds to the scores of `rows`: all at once, one question without each."""
        without = np.stack([np.delete(context, place) for place in range(len(context))])
        none = np.zeros(len(without), np.int64)
        less = self._fused(Questions(without, none, np.array([user or ""] * len(without)), none))
        ids = self.dataset.catalog.item_ids
        return {
            int(row): {
                ids[item]: float(scores[row] - less[place, row])
                for place, item in enumerate(context)
                if np.isfinite(less[place, row])
            }
            for row in rows
        }

    def _likeness(self, query: str) -> NDArray[np.float32]:
        """Return the cosine of every item with a text, by the frozen encoder: search asks for what is alike."""
        scores: NDArray[np.float32] = self._frozen @ self.bank.encode([query], None)[0]  # (N, D) @ (D,) -> (N,)
        return scores

    def _answers(self, wishes: Sequence[Wish], tagger: Tagger) -> list[_Answers]:
        """Find the items that answer each wish by what their titles name; a wish that none answers is left out."""
        if not wishes:
            return []
        asked = self.bank.encode([text for wish in wishes for text in (wish.text, wish.name)], None)
        alike = self._frozen @ asked.T  # (N, D) @ (D, 2 W) -> (N, 2 W)
        found = []
        for place, wish in enumerate(wishes):
            likeness, by_name = alike[:, 2 * place], alike[:, 2 * place + 1]
            read = np.array(list(dict.fromkeys([*_largest(likeness, _READ), *_largest(by_name, _READ)])), np.int64)
            titles = [self.dataset.catalog.titles[row] for row in read]
            heads = [head_entity(title, own) for title, own in zip(titles, tagger(titles), strict=True)]
            typed = np.array([head is not None and head.type == wish.type for head in heads])
            named = typed & [head is not None and same_thing(head.text, wish.name) for head in heads]
            rows = read[named if named.any() else typed]
            if len(rows):
                order = np.argsort(-likeness[rows], kind="stable")
                found.append(_Answers(wish, bool(named.any()), rows[order], likeness))
        return found

    def _beside(self, sets: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return beside(self.text_side, sets, rows)

    def _mutual(self, one: Composition) -> dict[int, dict[str, float]]:
        """Tell what each item of a bundle adds to how well an added one goes with the rest: the loss without it."""
        sets: list[NDArray[np.int64]] = []
        for row in one.added:
            rest = np.array([other for other in one.items if other != row], np.int64)
            sets += [rest, *(np.delete(rest, place) for place in range(len(rest)))]
        scores = self._beside(sets, np.array(one.added, np.int64))  # (A (1 + R), A)
        step = len(one.items)
        ids = self.dataset.catalog.item_ids
        found = {}
        for place, row in enumerate(one.added):
            whole, *less = scores[place * step : (place + 1) * step, place]
            others = [other for other in one.items if other != row]
            found[row] = {ids[other]: float(whole - part) for other, part in zip(others, less, strict=True)}
        return found

    def _suggestion(
        self, row: int, score: float, shares: dict[str, float], context: NDArray[np.int64], because: dict[str, float]
    ) -> Suggestion:
        catalog = self.dataset.catalog
        slot = catalog.slots[row] or catalog.leaf(row)
        return Suggestion(
            catalog.item_ids[row], catalog.titles[row], slot, self._prices[row], score, shares,
            self._together(row, context), because,
        )  # fmt: skip

    def _together(self, row: int, context: NDArray[np.int64]) -> dict[str, int]:
        counts = co_counts(self._history, row, context)
        ids = self.dataset.catalog.item_ids
        return {ids[other]: int(count) for other, count in zip(context, counts, strict=True) if count}

    def _recommendation(
        self, one: Composition, judged: _Judged | None, explain: bool, answers: Sequence[_Answers] = ()
    ) -> Recommendation:
        catalog = self.dataset.catalog
        evidence = []
        because = self._mutual(one) if explain and len(one.items) > 2 else {}
        for item in one.evidence:
            told: dict[str, Any] = {"item": catalog.item_ids[item.row], "slot": item.slot}
            if answered := [one for one in answers if item.row in one.rows]:
                told["answers"] = [
                    {"wish": one.wish.name, "type": one.wish.type, "named": one.named} for one in answered
                ]
            if item.partner is not None and item.partner_count:
                told["together"] = {"with": catalog.item_ids[item.partner], "bundles": item.partner_count}
            if item.shared:
                told["agrees"] = dict(item.shared)
            if item.rule is not None:
                rule = item.rule
                told["rule"] = {
                    "given": rule.given, "slot": rule.slot, "support": rule.support, "of": rule.bundles,
                    "confidence": rule.confidence,
                }  # fmt: skip
            told["relevance"], told["compatibility"] = item.relevance, item.compatibility
            if judged is not None:
                told["scorers"] = judged.shares(item.row)
            if item.row in because:
                told["because"] = because[item.row]
            evidence.append(told)
        return Recommendation(
            tuple(catalog.item_ids[row] for row in one.items),
            tuple(catalog.titles[row] for row in one.items),
            one.slots,
            tuple(catalog.item_ids[row] for row in one.added), one.score, one.parts,
            None if np.isnan(one.price) else one.price, tuple(evidence),
        )  # fmt: skip


def fitted_as(
    known: Known, settings: Mapping[str, str], seed: int, as_before: Mapping[str, Fitted]
) -> dict[str, Fitted]:
    """Fit each scorer in the setting that was picked for it; what does not learn from bundles stays as it was."""
    found = families(known, set(known.user_rows), seed)
    fitted: dict[str, Fitted] = {}
    for name, setting in settings.items():
        if name in (BY_CATEGORY, ENSEMBLE) or name.startswith(TUNED):
            fitted[name] = as_before[name]
            continue
        fitted[name] = next(choice for choice in found[name] if choice.setting == setting).fit()
    return fitted


def _within(constraints: Constraints, budget: float | None) -> Constraints:
    return constraints if constraints.budget is not None else replace(constraints, budget=budget)


def _answered(likeness: NDArray[np.float32], answers: Sequence[_Answers]) -> NDArray[np.float32]:
    """Put the likeness to the words of a wish in place of that to the whole query, for items that answer one: (N,)."""
    own = np.full_like(likeness, -np.inf)
    for one in answers:
        own[one.rows] = np.maximum(own[one.rows], one.likeness[one.rows])
    return np.where(np.isfinite(own), own, likeness)


def _largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the places of the k largest, best first; of equals the earlier one."""
    if len(scores) > k:
        # The k-th largest and all that equal it, so that the order of equals is that of the rows.
        edge = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= edge)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k]


def _summed(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Add relevances of different origin, each as standard scores; unknown stays unknown only where all are."""
    if len(parts) < 2:
        return parts[0] if parts else None
    standard = [(part - np.nanmean(part)) / max(float(np.nanstd(part)), 1e-9) for part in parts]
    known = np.any([np.isfinite(part) for part in standard], axis=0)
    total = np.sum([np.nan_to_num(part, nan=0.0) for part in standard], axis=0)
    return np.where(known, total, np.nan).astype(np.float32)
