"""Offline evaluation of bundle completion: every scorer, baselines and their fusion, with how sure we may be.

Owns the protocol: what is fitted on what, which settings validation may choose, and that the test bundles are looked
at once. Sees encoders as the vectors they gave; knows nothing of how adapters are trained or stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.composition import compare_compositions
from peft_combo.evaluation.detection import check_sessions, compare_detections, detect_held_out
from peft_combo.evaluation.measures import UnseenFirst, find_slices, make_rows, measure_queries
from peft_combo.evaluation.report import QueryResults, Report
from peft_combo.metrics.report import find_row
from peft_combo.recommender.category_calibration import CategoryCoverage
from peft_combo.recommender.fit_data import FitData, Rated, Tuned
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.model_selection import (
    list_scorers,
    make_queries,
    score_ndcg,
    select_settings,
    select_text_scorer,
)
from peft_combo.recommender.scorer_id import FUSION, RANDOM, UNSEEN_FIRST, WORDS, ScorerId

PROTOCOL = (
    "Every item of every held-out bundle once the answer, ranked among the whole catalogue without the rest of its "
    "bundle, ties at mid-rank. Scorers are fitted on training bundles alone, with the interactions of training users "
    'where validation prefers it; "bought before", "users alike", "next basket" and "rated" read what the owner of a '
    'bundle took in these, nothing where users are held out as a whole, and "rated" may count the rest of the bundle '
    "as taken last. Settings and fusion weights are chosen on validation bundles; test bundles are scored once. "
    '"TF-IDF, unseen first" puts items of no training bundle before all others: what it gains is no skill but what the '
    'catalogue gives away, and nothing in "cold among cold"; "among distractors" ranks the answer among the items that '
    "are in no bundle at all. 95 % intervals by bootstrap over groups; p by paired "
    "permutation of groups, two-sided."
)

# Scores of the validation queries are held in memory for all rows at once: 1.5e8 float32 are 600 MB.
_HELD_CELLS = 150_000_000


def evaluate(
    dataset: Dataset,
    parts: Split,
    *,
    frozen: NDArray[np.float32] | None = None,
    described: NDArray[np.float32] | None = None,
    tuned: Tuned | None = None,
    rated: Rated | None = None,
    coverage: CategoryCoverage | None = None,
    seed: int = 0,
    max_queries: int = 5000,
    compose: bool = False,
    sessions: bool = False,
    advance: Callable[[str], None] | None = None,
) -> Report:
    """Fit every scorer on train, choose on validation, measure on test once.

    Args:
        frozen: (N, D) vectors of ``dataset.plain`` by the encoder without adapter; None leaves its rows out.
        described: (N, D) the same of ``dataset.described``; None leaves them out.
        tuned: per adapter its (N, D) item vectors and its head. They must have been tuned on ``parts.train``.
        rated: the same of rating adapters, which must not have seen the users of test bundles: `rating_problem`.
        coverage: which of them is for which items, see `CategoryCoverage.of`; adds the row of all of them together.
        seed: of sampling, bootstrap and permutations.
        max_queries: more test queries than so many are sampled, whole bundles at a time.
        compose: also compose whole bundles, see `composition`; takes as long again or longer.
        sessions: also detect the bundles in the sessions of test users, see `detection`.
        advance: told the name of each row that is done.
    Raises:
        PeftComboError: the split has no validation or no test bundles, or sessions are asked for that are not there.
    """
    _check_parts(dataset, parts, sessions)
    advance = advance or (lambda name: None)
    notes = [f"{dataset.name}: {note}" for note in dataset.notes]
    known = FitData.of(dataset, parts.train, parts.train_interactions, frozen, tuned or {}, coverage, rated, described)

    # What is asked.
    owners = {dataset.bundles.groups[row] for row in parts.valid}
    found = list_scorers(known, owners, seed)
    limit = min(2000, max(100, _HELD_CELLS // (len(found) * len(dataset.catalog))))
    valid = make_queries(dataset, parts.valid, limit, seed, "valid", notes)
    test = make_queries(dataset, parts.test, max_queries, seed, "test", notes)

    # Fit each row in each of its settings, and keep the one that is best on validation.
    selected = select_settings(found, valid, known, seed, advance, notes)
    asks = {name: one.fitted for name, one in selected.items()}
    settings = {name: one.setting for name, one in selected.items()}
    on_valid = {name: one.ndcg for name, one in selected.items()}

    # Fuse; the floor of the table has nothing to contribute.
    candidates = {name: one.scores for name, one in selected.items() if name != RANDOM}
    fusion = Fusion.fit(candidates, valid.targets, known.evidence(valid), valid.groups, seed=seed)
    text_scorer = select_text_scorer(selected)
    side = selected[text_scorer].fitted if text_scorer else None
    selected.clear()
    candidates.clear()
    _put_unseen_first(asks, settings, on_valid, known, valid)
    on_valid[FUSION] = find_row(fusion.table, fusion.chosen).ndcg
    settings[FUSION] = fusion.chosen

    # Test, once.
    measured = measure_queries(asks, fusion, dataset, test, known, seed)
    advance(str(FUSION))
    slices = find_slices(dataset, known, test)
    lines = make_rows(measured, settings, on_valid, slices, test, known, seed)
    answers = QueryResults(
        test.groups, slices, {str(scorer): own for scorer, own in measured.ranks.items()},
        {str(scorer): own for scorer, own in measured.fill_ins.items()},
    )  # fmt: skip
    composition = None
    if compose:
        if side is None and frozen is not None:
            side = FittedHead.of_frozen(frozen)
        composition = compare_compositions(dataset, parts, known, asks, fusion, side, valid, test, seed, advance)
    held_out = [detect_held_out(dataset, parts, known, seed=seed, advance=advance)] if sessions else []
    detection = compare_detections(held_out, "test", seed) if held_out else None
    return Report(
        dataset.name, dataset.digest, parts.digest, seed, PROTOCOL, _count(dataset, parts, valid, test), lines, fusion,
        tuple(notes), answers, composition, detection,
    )  # fmt: skip


def _check_parts(dataset: Dataset, parts: Split, sessions: bool) -> None:
    if sessions:
        check_sessions(dataset)
    if not len(parts.valid) or not len(parts.test):
        raise PeftComboError(
            f"An evaluation needs validation and test bundles; the split of {dataset.name!r} has {len(parts.valid)} "
            f"and {len(parts.test)}. Raise data.valid_fraction and data.test_fraction."
        )


def _put_unseen_first(
    asks: dict[ScorerId, Fitted], settings: dict[ScorerId, str], on_valid: dict[ScorerId, float], known: FitData,
    valid: Queries,
) -> None:  # fmt: skip
    """Add the row that shows what the catalogue gives away."""
    if WORDS in asks:
        asks[UNSEEN_FIRST] = UnseenFirst(asks[WORDS], known.support == 0)
        settings[UNSEEN_FIRST] = settings[WORDS]
        on_valid[UNSEEN_FIRST] = score_ndcg(asks[UNSEEN_FIRST], valid)


def _count(dataset: Dataset, parts: Split, valid: Queries, test: Queries) -> dict[str, int]:
    return {
        "items": len(dataset.catalog),
        "train bundles": len(parts.train),
        "valid bundles": len(parts.valid),
        "test bundles": len(parts.test),
        "valid questions": len(valid),
        "test questions": len(test),
        "test groups": len(set(test.groups.tolist())),
    }
