"""Evaluation of bundle composition: composer, beam search and top-k lists on whole held-out bundles.

Owns the protocol of that comparison and its table. The evaluation fits everybody and hands over the same test bundles
it measures completion on; only the composer's weights are chosen here, on its validation queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.metrics.report import find_row
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.fit_weights import fit_item_weights, make_judge
from peft_combo.recommender.composing.generation import Sizes, Steps, build_steps, generate
from peft_combo.recommender.composing.openings import Openings, compose_openings
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead, ItemVectors, fuse_scorers
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.model_selection import split_blocks
from peft_combo.recommender.scorer_id import FUSION, ScorerId

PROTOCOL = (
    "For each test bundle one of its items, drawn once for the seed, and its size are given; the others are composed. "
    "Precision and recall count composed and wanted items beside the given one, which are as many where the size is "
    "told; exact is the share of bundles met as a whole, Jaccard the shared of all such items. Valid is the share with "
    "the items asked for, each of the catalogue and none twice. Diversity is 1 - mean cosine of the frozen vectors "
    "within a whole bundle (of the words of the titles without an encoder). Top-k takes the best single completions. "
    "The composer is the one that serves, with slot templates of training bundles and weights chosen on validation "
    "bundles composed in the same way. The beam search takes no text "
    'twice; "to its end" is not told the size. 95 % intervals by bootstrap over groups; p by paired permutation of '
    "groups, two-sided, of the difference in recall to the composer of the fusion."
)
TOP_K, COMPOSER, BEAM, OPEN = "top-k", "composer", "beam", "beam to its end"
VALUES = ("precision", "recall", "exact", "jaccard", "valid", "diversity")

_BEAM = 16


@dataclass(frozen=True)
class ComposedRow:
    """One line of the table.

    Attributes:
        name: how and by whose scores. values: by `VALUES`; those which no bundle has are missing. intervals: 95 %.
        p: of the difference in recall to the composer of the fusion; None for that row itself.
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    p: float | None


@dataclass(frozen=True)
class CompositionReport:
    """What the comparison found.

    Attributes:
        weights: of the composer's objective, as validation chose them.
        bundles: how many were composed, of so many independent `groups`.
    """

    protocol: str
    weights: dict[str, float]
    bundles: int
    groups: int
    rows: tuple[ComposedRow, ...]

    def row(self, name: str) -> ComposedRow:
        """Return the line of that name; see `find_row`."""
        return find_row(self.rows, name)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def compare_compositions(
    dataset: Dataset,
    parts: Split,
    known: FitData,
    asks: Mapping[ScorerId, Fitted],
    fusion: Fusion[ScorerId],
    text_side: Fitted | None,
    valid: Queries,
    test: Queries,
    seed: int,
    advance: Callable[[str], None],
) -> CompositionReport:
    """Compose the bundles of the test queries in every way there is.

    Args:
        asks: by name whoever the fusion needs, and the heads of the tuned adapters.
        valid: validation queries, which choose the composer's weights.
        text_side: judges how well an item goes with a set, as for the composer that serves; None for none.
        advance: told the name of each row that is done.
    """
    openings = Openings.of(test, seed)
    texts = np.unique(np.array(known.texts), return_inverse=True)[1]
    ask_all = fuse_scorers(fusion, asks, known)
    seen = [dataset.bundles.items[row] for row in parts.train]
    rules = RuleSet.of(dataset.knowledge, dataset.catalog)
    composer = Composer.learn(dataset.catalog, seen, vectors=known.frozen, history=known.history, rules=rules)
    weights = fit_item_weights(composer, valid, ask_all, text_side, seed=seed)
    options = Options(k=1, weights=weights, seed=seed)
    vectors: ItemVectors = known.words if known.frozen is None else known.frozen
    heads = {name: ask for name, ask in asks.items() if isinstance(ask, FittedHead)}
    judges: list[tuple[ScorerId, Fitted, Fitted | None]] = [(FUSION, ask_all, text_side)]
    judges += [(name, head, head) for name, head in heads.items()]
    composed: dict[tuple[str, ScorerId], list[tuple[int, ...]]] = {}
    for name, ask, side in judges:
        scores = np.concatenate([ask(part) for part in split_blocks(openings.queries)])  # (B, N)
        composed[TOP_K, name] = _take_top(openings, scores)
        composed[COMPOSER, name] = compose_openings(openings, composer, scores, make_judge(side), options)
        advance(f"{COMPOSER}, {name}")
    most = int(dataset.bundles.sizes[parts.train].max()) - 1
    for name, head in heads.items():
        steps = build_steps(head.head, head.vectors)
        composed[BEAM, name] = _generate_all(openings, steps, texts, None)
        if isinstance(head.head, SequenceHead):
            composed[OPEN, name] = _generate_all(openings, steps, texts, (1, most))
        advance(f"{BEAM}, {name}")

    found = {
        (way, scorer): _measure_bundles(added, openings, vectors, told=way != OPEN)
        for (way, scorer), added in composed.items()
    }
    against = found[COMPOSER, FUSION]["recall"]
    rows = tuple(
        _make_row(f"{way}, {scorer}", values, openings.groups, None if values["recall"] is against else against, seed)
        for (way, scorer), values in found.items()
    )
    return CompositionReport(PROTOCOL, asdict(weights), len(openings), len(set(openings.groups.tolist())), rows)


def _take_top(openings: Openings, scores: NDArray[np.float32]) -> list[tuple[int, ...]]:
    """Take for each bundle the best of its scores, (B, N); of equals the earlier ones."""
    values = np.where(np.isnan(scores), -np.inf, scores)
    values[np.arange(len(openings)), openings.given] = -np.inf
    order = np.argsort(-values, axis=1, kind="stable")
    return [
        tuple(row for row in best[: len(wanted)].tolist() if np.isfinite(own[row]))
        for best, own, wanted in zip(order, values, openings.wanted, strict=True)
    ]


def _generate_all(
    openings: Openings, steps: Steps, texts: NDArray[np.int64], sizes: tuple[int, int] | None
) -> list[tuple[int, ...]]:
    """Write each bundle of its size, or of whatever number of items between `sizes` is most probable."""
    found: list[tuple[int, ...]] = []
    for given, wanted in zip(openings.given.tolist(), openings.wanted, strict=True):
        low, high = sizes or (len(wanted), len(wanted))
        best = generate(steps, [given], Sizes(np.ones(len(texts), bool), low, high), beam=_BEAM, copies=texts)
        found.append(best[0].added if best else ())
    return found


def _measure_bundles(
    composed: Sequence[tuple[int, ...]], openings: Openings, vectors: ItemVectors, *, told: bool
) -> dict[str, NDArray[np.float64]]:
    """Measure bundles one by one: by `VALUES`, (B,); NaN where a bundle of one item has no diversity."""
    values = {name: np.full(len(openings), np.nan) for name in VALUES}
    for place, (added, given, wanted) in enumerate(zip(composed, openings.given, openings.wanted, strict=True)):
        mine, theirs = set(added), set(wanted.tolist())
        hits = len(mine & theirs)
        whole = [int(given), *added]
        asked_for = len(added) == len(wanted) if told else len(added) > 0
        values["precision"][place] = hits / max(1, len(added))
        values["recall"][place] = hits / len(theirs)
        values["exact"][place] = mine == theirs
        values["jaccard"][place] = hits / len(mine | theirs)
        in_catalogue = min(whole) >= 0 and max(whole) < vectors.shape[0]
        values["valid"][place] = asked_for and in_catalogue and len(set(whole)) == len(whole)
        if added and in_catalogue:
            values["diversity"][place] = 1 - _mean_cosine(vectors, whole)
    return values


def _mean_cosine(vectors: ItemVectors, rows: Sequence[int]) -> float:
    members: Any = vectors[list(rows)]
    product = members @ members.T
    alike = product if isinstance(product, np.ndarray) else product.toarray()
    return float(alike[np.triu_indices(len(rows), 1)].mean())


def _make_row(
    name: str, values: Mapping[str, NDArray[np.float64]], groups: NDArray[np.str_],
    against: NDArray[np.float64] | None, seed: int,
) -> ComposedRow:  # fmt: skip
    told = {value: ~np.isnan(found) for value, found in values.items()}
    return ComposedRow(
        name,
        {value: float(found[told[value]].mean()) for value, found in values.items() if told[value].any()},
        {
            value: metrics.bootstrap_interval(found[told[value]], groups[told[value]], seed=seed)
            for value, found in values.items()
            if told[value].any()
        },
        None if against is None else metrics.paired_permutation(values["recall"], against, groups, seed=seed),
    )
