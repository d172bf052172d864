"""Bundle generation: completes a bundle, makes new ones and ranks given ones by one objective, with evidence.

Owns the job from rows and scores to compositions; the search space, the search, the objective and the evidence have a
module each. Knows nothing of who made the scores, of models, files or requests.

The objective of a bundle B, of which C was given and A = B without C is added, is the sum of these parts:

    relevance       weight * mean over i in A of r(i)              r: one score per item for the user, basket or query
    compatibility   weight * mean over i in A of c(i | B - i)      c: scores given a set; every item against all others
    slots           weight * log P(slots of B)                     `SlotTemplates.log_probability`; 0 for substitutes
    agreement       weight * mean over i in A of a(i | B - i)      a: mean over the others, see `Agreement`
    redundancy     -weight * mean over i in A of max cosine(i, j)  over the other items j of B; no less than 0
    rules           -the weights of the soft rules that B breaks, where the data have such

r and c are made comparable first: z-scores over the items the scorer knows, all of them for r and a fixed sample of the
catalogue for c (all where there are at most `sample`), then arcsinh, which is linear near 0 and logarithmic in the
tails, so that one huge score cannot outweigh all else. Items the scorer cannot speak of (NaN or infinite) get the
lowest known score. Nothing depends on the order in which items were added.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.data.knowledge.clashes import find_minimal_conflict
from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError
from peft_combo.recommender.composing.agreement import Agreement
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.diversity import diversify
from peft_combo.recommender.composing.evidence import Composition, EvidenceSource
from peft_combo.recommender.composing.feasibility import check_given, explain_clash, explain_infeasible, keep_rules
from peft_combo.recommender.composing.objective import Objective, ScoreScale
from peft_combo.recommender.composing.options import Compatibility, ObjectiveWeights, OneOf, Options, Rows, check_scores
from peft_combo.recommender.composing.query_bundles import search_around
from peft_combo.recommender.composing.search import search_bundles
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog, build_search_space, find_budget
from peft_combo.recommender.composing.slots import SlotTemplates
from peft_combo.scoring.base import SparseRows

NEAR_DUPLICATE = 0.95  # cosine of items that are nearly the same
_SHARE = 0.01  # of training bundles with such items, above which they belong in bundles
_BUNDLES = 2_000  # looked at for them
_SCALE_SAMPLE = 1024  # items the mean and deviation of c are taken over; both are then known to 3 % of the deviation


class Composer:
    """Composes and ranks bundles of one catalogue; safe to share between threads, for it changes nothing.

    Args:
        catalog: N items.
        templates: what bundles look like.
        vectors: (N, D) float32 of length 1, for likeness between items; None knows of equal titles only.
        history: (B, N) training bundles, for counts in the evidence and whether near-duplicates belong in bundles.
        agreement: what bundles agree on, of the same catalogue; None judges no bundle by it.
        weights: of the objective, where a request names none.
        sample: items that the mean and deviation of the compatibility term are taken over.
        rules: of bundles of the same catalogue.
    Raises:
        ValueError: vectors or history are not of N items.
    """

    def __init__(
        self,
        catalog: Catalog,
        templates: SlotTemplates,
        *,
        vectors: NDArray[np.float32] | None = None,
        history: SparseRows | None = None,
        agreement: Agreement | None = None,
        weights: ObjectiveWeights = ObjectiveWeights(),
        sample: int = _SCALE_SAMPLE,
        rules: RuleSet | None = None,
    ) -> None:
        if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(catalog)):
            raise ValueError(f"vectors must be ({len(catalog)}, D), found {vectors.shape}.")
        csc: Any = None if history is None else sparse.csc_array(history)
        if csc is not None and csc.shape[1] != len(catalog):
            raise ValueError(f"history must have {len(catalog)} columns, found {csc.shape[1]}.")
        self.catalog = catalog
        self.vectors = vectors
        self.weights = weights
        self._slotted = SlottedCatalog.of(catalog, templates, rules=rules)
        self._agreement = agreement
        self._evidence = EvidenceSource(self._slotted, vectors, csc, agreement)
        self.near_duplicate = self._learn_near_duplicate(csc)
        self._sample = np.sort(np.random.default_rng(0).permutation(len(catalog))[:sample])

    @classmethod
    def learn(
        cls,
        catalog: Catalog,
        bundles: Sequence[NDArray[np.integer[Any]]],
        *,
        vectors: NDArray[np.float32] | None = None,
        history: SparseRows | None = None,
        rules: RuleSet | None = None,
    ) -> Composer:
        """Learn templates and agreement from bundles, each the rows of its items; see `Composer` for the rest."""
        templates, agreement = SlotTemplates.learn(catalog, bundles), Agreement.learn(catalog, bundles)
        return cls(catalog, templates, vectors=vectors, history=history, agreement=agreement, rules=rules)

    @property
    def templates(self) -> SlotTemplates:
        """What bundles look like."""
        return self._slotted.templates

    def with_templates(self, templates: SlotTemplates) -> Composer:
        """Return a composer of the same catalogue under templates of the same slots, as `with_rules` gives them.

        What was made of the catalogue is shared, so this costs nothing.

        Raises:
            ValueError: the templates have other slots.
        """
        other = copy.copy(self)
        other._slotted = self._slotted.with_templates(templates)
        other._evidence = replace(self._evidence, slotted=other._slotted)
        return other

    def extend(
        self, catalog: Catalog, vectors: NDArray[np.float32], history: SparseRows, changed: Iterable[int],
        hidden: NDArray[np.bool_], rules: RuleSet | None = None,
    ) -> Composer:  # fmt: skip
        """Return a composer of a longer catalogue under what was learned from bundles before.

        Args:
            catalog: N' items, of which the first N are those of before. vectors: (N', D). history: (B, N').
            changed: rows of the first N that are not as they were. hidden: (N',) items that may not be added.
            rules: of the longer catalogue.
        """
        other = copy.copy(self)
        other.catalog, other.vectors = catalog, vectors
        other._slotted = SlottedCatalog.of(catalog, self.templates, hidden, rules)
        if self._agreement is not None:
            later = [*changed, *range(len(self.catalog), len(catalog))]
            other._agreement = replace(self._agreement, traits=self._agreement.traits.extend(catalog, later))
        csc: Any = sparse.csc_array(history)
        other._evidence = EvidenceSource(other._slotted, vectors, csc, other._agreement)
        return other

    @property
    def rules(self) -> RuleSet:
        """Rules of bundles that it keeps."""
        return self._slotted.rules

    def find_allowed(
        self, constraints: Constraints, *, required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None, beside: Rows | None = None,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Which items may be added, (N,).

        Args:
            beside: rows that make a bundle with the item, which breaks no hard rule then; None for none.
            required: slots one of which an item is in. forbidden: slots it is not in.
        Raises:
            DataError: the catalogue has no such attribute, value, category or slot, or hard rules leave no item.
            ValueError: a row to exclude is not of the catalogue.
        """
        allowed = np.ones(len(self.catalog), bool)
        for check in self._slotted.index.check(constraints).values():
            allowed &= check
        for names, inside in ((required, True), (forbidden, False)):
            if names is not None:
                slots = [self.templates.find_slot(name) for name in names]
                allowed &= np.isin(self._slotted.slot_of, slots, invert=not inside)
        return allowed if beside is None else keep_rules(self._slotted, allowed, beside.tolist())

    def find_replacements(self, row: int, rest: Rows, constraints: Constraints) -> NDArray[np.bool_]:
        """Which items may take the place of one beside the rest of its bundle, (N,): those of its slot.

        Raises:
            DataError: as `find_allowed`; there is a budget, and a price of the rest is not known.
        """
        allowed = self.find_allowed(constraints)
        allowed &= self._slotted.slot_of == self._slotted.slot_of[row]
        left = find_budget(self._slotted, tuple(rest.tolist()), constraints)
        if left is not None:
            allowed &= self._slotted.index.cents <= left
        return keep_rules(self._slotted, allowed, rest.tolist())

    def compose(
        self,
        context: Sequence[int] | Rows = (),
        *,
        one_of: Sequence[OneOf] = (),
        relevance: ArrayLike | None = None,
        compatibility: Compatibility | None = None,
        constraints: Constraints | None = None,
        options: Options | None = None,
    ) -> list[Composition]:
        """Complete the context, or make bundles from nothing, best first.

        Exhaustive where there are few enough sets of allowed items (`Options.exact_limit`); else a beam search through
        the most probable templates, over a shortlist of the items of each slot (`Options.shortlist`), whose finished
        bundles are scored anew with the objective.

        Args:
            context: distinct rows that every bundle keeps; may be empty.
            named: of each every bundle has exactly one item, beside the context. First sets of one item for each are
                found, then each of the best sets is completed. Not for substitutes.
            relevance: (N,) scores, higher is better; None for none.
            compatibility: scores of items beside sets, asked for once a step; None for none.
            constraints: hard; all bundles keep to them.
            options: see there.
        Returns:
            At most k compositions of distinct item sets. Where `diversity` is above 0 their order is that of the
            choice, and only the first is sure to have the highest score.
        Raises:
            DataError: no bundle meets the constraints; the message names those that bind.
            ValueError: a row or a shape does not fit the catalogue.
        """
        constraints, options = constraints or Constraints(), options or Options()
        given = self._check_rows(context)
        objective = self._make_objective(relevance, compatibility, options)
        if one_of:
            check_given(self._slotted, given)
            found = search_around(self._slotted, given, one_of, constraints, objective)
        else:
            found = search_bundles(self._slotted, self.check_feasible(given, constraints, options), objective)
        if not found and (clash := self._find_clash(given, one_of, constraints, options)):
            raise explain_clash(clash)
        if not found:
            raise DataError(
                f"No bundle was found in which no two items are alike (near_duplicate {objective.near_duplicate}), "
                "though the other constraints leave enough items. Raise near_duplicate, or ask for fewer items."
            )
        ranked = sorted(
            objective.score_bundles(given, found), key=lambda one: (-one.score, objective.make_tie_key(one.added))
        )
        return [self._evidence.describe(given, one) for one in diversify(ranked, options, objective)]

    def check_feasible(self, context: Sequence[int] | Rows, constraints: Constraints, options: Options) -> SearchSpace:
        """Return what may be added to a context; needs prices, slots and rules alone, so no vectors and no scores.

        Raises:
            DataError: no bundle meets the constraints; the message names those that bind.
        """
        given = self._check_rows(context)
        check_given(self._slotted, given)
        space = build_search_space(self._slotted, given, constraints, options)
        if not space.feasible:
            raise explain_infeasible(self._slotted, given, constraints, options)
        return space

    def _find_clash(
        self, given: tuple[int, ...], one_of: Sequence[OneOf], constraints: Constraints, options: Options
    ) -> list[str]:
        """Return a minimal set of hard rules that no bundle keeps; an empty list where rules are not the reason."""

        def feasible(kept: Collection[str]) -> bool:
            other = copy.copy(self)
            other._slotted = replace(self._slotted, rules=self.rules.select(kept))
            objective = other._make_objective(None, None, options)
            try:
                if one_of:
                    return bool(search_around(other._slotted, given, one_of, constraints, objective))
                space = build_search_space(other._slotted, given, constraints, options)
                return space.feasible and bool(search_bundles(other._slotted, space, objective))
            except DataError:
                return False

        return find_minimal_conflict([str(one.rule) for one in self.rules.hard], feasible) if feasible(()) else []

    def rank(
        self,
        bundles: Sequence[Sequence[int] | NDArray[np.integer[Any]]],
        *,
        context: Sequence[int] | Rows = (),
        relevance: ArrayLike | None = None,
        compatibility: Compatibility | None = None,
        options: Options | None = None,
    ) -> list[Composition]:
        """Score given bundles with the same objective, best first; equal ones stay in the order given.

        Args:
            bundles: each distinct rows with the context among them and at least one more.
        Raises:
            ValueError: a bundle lacks the context, or has nothing besides.
        """
        given = self._check_rows(context)
        added = []
        for bundle in bundles:
            rows = self._check_rows(bundle)
            if not set(given) < set(rows):
                raise ValueError(f"Every bundle must hold the context {given} and more, found {rows}.")
            added.append(tuple(row for row in rows if row not in given))
        objective = self._make_objective(relevance, compatibility, options or Options())
        ranked = sorted(objective.score_bundles(given, added), key=lambda one: -one.score)
        return [self._evidence.describe(given, one) for one in ranked]

    def score_completions(
        self, contexts: Sequence[Rows], relevance: NDArray[np.floating[Any]], beside: NDArray[np.floating[Any]] | None
    ) -> dict[str, NDArray[np.float64]]:
        """Return the parts of the objective, unweighed, of each context with any one item more.

        Args:
            contexts: Q arrays of distinct rows.
            relevance, beside: (Q, N) scores; None for none.
        Returns:
            "relevance", "compatibility", "slots", "agreement" and "redundancy", (Q, N) each, the last as a loss.
        """
        zero = np.zeros((len(contexts), 1))
        logs = np.empty((len(contexts), len(self.catalog)))
        for place, rows in enumerate(contexts):
            held = self._slotted.slot_of[rows].tolist()
            of_slot = [
                self.templates.log_probability(tuple(sorted((*held, slot))))
                for slot in range(len(self.templates.names))
            ]
            logs[place] = np.array(of_slot)[self._slotted.slot_of]
        return {
            "relevance": ScoreScale(relevance).apply(relevance),
            "compatibility": zero if beside is None else ScoreScale(beside[:, self._sample]).apply(beside),
            "slots": logs,
            "agreement": zero
            if self._agreement is None
            else self._agreement.score_beside([rows.tolist() for rows in contexts], np.arange(len(self.catalog))),
            "redundancy": zero if self.vectors is None else self._measure_redundancy(contexts),
        }

    def _measure_redundancy(self, contexts: Sequence[Rows]) -> NDArray[np.float64]:
        """Return minus the greatest cosine of every item with those of each context, at most 0: (Q, N)."""
        assert self.vectors is not None
        alike = [(self.vectors @ self.vectors[rows].T).max(axis=1, initial=0.0) for rows in contexts]
        return -np.stack(alike).astype(np.float64)

    def _check_rows(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[int, ...]:
        found = tuple(int(row) for row in rows)
        if len(set(found)) != len(found):
            raise ValueError(f"rows must be distinct, found {list(found)}.")
        if found and not 0 <= min(found) <= max(found) < len(self.catalog):
            raise ValueError(f"rows must lie in 0..{len(self.catalog) - 1}, found {list(found)}.")
        return found

    def _learn_near_duplicate(self, history: Any) -> float | None:
        """Return the cosine above which items do not belong in one bundle, as training bundles have it.

        1 where they hold items that are nearly the same, but not of the same title; None where they hold these too. Of
        many bundles a sample is looked at.
        """
        if history is None:
            return NEAR_DUPLICATE
        rows = sparse.csr_array(history)
        several = np.random.default_rng(0).permutation(np.flatnonzero(np.diff(rows.indptr) > 1))[:_BUNDLES]
        titles, same, alike = self._slotted.index.titles, 0, 0
        for bundle in several.tolist():
            members = rows.indices[rows.indptr[bundle] : rows.indptr[bundle + 1]]
            same += len(np.unique(titles[members])) < len(members)
            if self.vectors is not None:
                own = self.vectors[members]
                alike += bool((np.triu(own @ own.T, 1) > NEAR_DUPLICATE).any())
        if same > _SHARE * len(several):
            return None
        return 1.0 if alike > _SHARE * len(several) else NEAR_DUPLICATE

    def _make_objective(
        self, relevance: ArrayLike | None, compatibility: Compatibility | None, options: Options
    ) -> Objective:
        return Objective(
            weights=options.weights or self.weights,
            relevance=None if relevance is None else check_scores(relevance, (len(self.catalog),), "relevance"),
            compatibility=compatibility,
            options=options,
            slotted=self._slotted,
            agreement=self._agreement,
            near_duplicate=self.near_duplicate if options.near_duplicate == "learned" else options.near_duplicate,
            vectors=self.vectors,
            sample=self._sample,
        )
