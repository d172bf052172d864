"""What users take next: baskets completed and next baskets foretold by every scorer, and by fusions of them.

    PEFT_COMBO_DATA=PATH python benchmarks/behaviour.py            # validation part of Online Retail, by time; minutes
    PEFT_COMBO_DATA=PATH python benchmarks/behaviour.py --test     # its test part, once

PATH holds `online_retail`; `--data-root` says the same. The split is by time, for all users alike. Two questions:

- completion: each item of a held-out basket, given the others and its owner (`evaluate`'s questions).
- next basket: each item of the first basket a known user has from the part's first moment on, given what they took
  before. All items, and only those the user never took, which is what `recommend` shows unless told `--seen`. The other
  items of the basket are no candidates.

Scorers are fitted on what lies before the part; settings and weights of fusions are chosen on validation completions.
Validation tables are of the very part that settings were chosen on, so the fusion rows of its completions are
flattered. Intervals draw users, p exchanges them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _cases import parse_cases
from _smoke import make_tiny
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.data.splits import Split
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import Fitted, fuse_scorers
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.model_selection import list_scorers, make_queries, select_settings, split_blocks
from peft_combo.recommender.repurchase import PurchaseHistory, RepurchaseModel
from peft_combo.recommender.scorer_id import NEXT_BASKET, RANDOM, TEXT_RANKER, ScorerId
from peft_combo.recommender.user_habits import HISTORY, UserHabits, choose_habits
from peft_combo.scoring.popularity import SECONDS_PER_DAY, Popularity

CASES = {"online_retail": "lora-home"}
WITHOUT, WITH, RECENT, LAST = "fusion without next basket", "fusion", "recent popularity", "after the last basket"
HABITS, DUE = "fusion and habits, as served", "due within 14 days"
_HALF_LIFE = 14.0
Ranks = Mapping[str, NDArray[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="the test part in place of validation")
    parser.add_argument("--users", type=int, default=800, help="of the next basket, at most")
    parser.add_argument("--questions", type=int, default=1500, help="of completion, at most")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    options = parse_cases(parser, CASES)
    if options.smoke:
        with make_tiny() as tiny:
            write_purchases(tiny.shop)
            changes = (*tiny.changes, "data.min_bundle_size=2", "data.min_item_support=1", "data.valid_fraction=0.2")
            measure("online_retail", tiny.shop, changes, tiny.folder / "vectors", options)
        return
    for name in options.cases or CASES:
        measure(name, Path(options.data_root) / name, tuple(options.changes), Path("vectors"), options)


def write_purchases(shop: Path) -> None:
    """Give the made-up shop baskets in place of bundles: every user takes items of a style again and again."""
    (shop / "bundles.csv").unlink()
    (shop / "bundle_meta.csv").unlink()
    dice = random.Random(3)
    lines = [
        f"u{user},{user * 10 + turn},i{item},1,{1_700_000_000 + turn * 86_400 + user}"
        for user in range(20)
        for turn in range(0, 80, 8)
        for item in dice.sample(range(user % 6, 60, 6), 3)
    ]
    (shop / "interactions.csv").write_text("user_id,basket_id,item_id,quantity,timestamp\n" + "\n".join(lines) + "\n")


def measure(name: str, folder: Path, changes: tuple[str, ...], cache: Path, options: argparse.Namespace) -> None:
    """Print the tables of one data set."""
    space = Workspace.of(load_recipe(CASES[name], ("data.split=time", *changes), data=folder), cache=cache)
    dataset, parts = space.dataset, space.split
    frozen = space.encode_catalog()
    known = FitData.of(dataset, parts.train, parts.train_interactions, frozen, {})
    owners = {dataset.bundles.groups[row] for row in (*parts.valid, *parts.test)}
    choices = {
        scorer: list(settings)
        for scorer, settings in list_scorers(known, owners, 0).items()
        if scorer not in (RANDOM, TEXT_RANKER)
    }
    notes: list[str] = []
    valid = make_queries(dataset, parts.valid, options.questions, 0, "valid", notes)
    selected = select_settings(choices, valid, known, 0, lambda scorer: None, notes)
    scores = {scorer: one.scores for scorer, one in selected.items()}
    evidence = known.evidence(valid)
    fusions = {
        label: Fusion.fit({s: own for s, own in scores.items() if s in kept}, valid.targets, evidence, valid.groups)
        for label, kept in ((WITHOUT, scores.keys() - {NEXT_BASKET}), (WITH, scores.keys()))
    }
    settings = {scorer: one.setting for scorer, one in selected.items()}
    weight = dict(fusions[WITH].weights.get(NEXT_BASKET, {}))
    print(f"{name} ({parts.digest[:12]}), {'test' if options.test else 'validation'}")
    print(f"next basket: {settings[NEXT_BASKET]}; its weight in the fusion: {weight}\n")
    asks = {scorer: one.fitted for scorer, one in selected.items()}
    form = fusions[WITH].form
    fused = fuse_scorers(fusions[WITH], asks, known)
    habit_weight = choose_habits(known, dataset.bundles, parts.valid, fused, asks[NEXT_BASKET], form)
    print(f"its weight where a user is all there is to go by: {habit_weight:g}\n")
    rows = parts.test if options.test else parts.valid
    asked = make_queries(dataset, rows, options.questions, 0, "asked", notes)
    both = {label: fuse_scorers(fusion, asks, known) for label, fusion in fusions.items()}
    print_table("completion", rank(asks, both, known, asked, asked.excluded()), asked.groups)
    start = dataset.bundles.times[rows].min()
    if options.test:
        known = FitData.of(dataset, *before(dataset, parts, start), frozen, {})
        again = list_scorers(known, owners, 0)
        asks = {s: next(one for one in again[s] if one.setting == settings[s]).fit() for s in asks}
    habits = UserHabits.of(known, settings[NEXT_BASKET], habit_weight)
    served = fuse_scorers(fusions[WITH], asks, known)

    def ask_served(queries: Queries) -> NDArray[np.float32]:
        return served(queries) + habits.share(queries, known.evidence(queries), form)

    foretell(dataset, known, asks, {WITHOUT: fuse_scorers(fusions[WITHOUT], asks, known), WITH: served,
             HABITS: ask_served}, start, options.users)  # fmt: skip


def before(dataset: Dataset, parts: Split, start: float) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the rows of bundles and of interactions that lie before a moment."""
    assert dataset.interactions is not None
    rows = np.sort(np.concatenate([parts.train, parts.valid]))
    return rows[dataset.bundles.times[rows] < start], np.flatnonzero(dataset.interactions.times < start)


def foretell(
    dataset: Dataset, known: FitData, asks: Mapping[ScorerId, Fitted], fusions: Mapping[str, Fitted], start: float,
    most: int,
) -> None:  # fmt: skip
    """Print how well the next baskets of known users are foretold."""
    assert dataset.interactions is not None
    assert known.interactions is not None
    later = dataset.interactions.take((dataset.interactions.times >= start) & (dataset.interactions.users >= 0))
    users = np.unique(later.users[np.diff(known.past.indptr)[later.users] > 0])
    users = np.sort(np.random.default_rng(0).permutation(users)[:most])
    taken, starts = known.interactions.list_taken(len(dataset.catalog))
    contexts, targets, owner, others = [], [], [], []
    order = np.argsort(later.times, kind="stable")
    for user in users.tolist():
        mine = order[later.users[order] == user]
        basket = np.unique(later.items[mine[later.baskets[mine] == later.baskets[mine[0]]]]).astype(np.int64)
        for item in basket.tolist():
            contexts.append(taken[starts[user] : starts[user + 1]][:HISTORY])
            targets.append(item)
            owner.append(user)
            others.append(basket[basket != item])
    places, owners = np.array(owner), np.array([dataset.interactions.user_ids[user] for user in owner])
    queries = Queries(pad_contexts(contexts), np.array(targets), owners, np.zeros(len(targets), np.int64))
    had = np.asarray(known.past[places, queries.targets]).ravel() > 0
    print(f"{len(users):,} users, {len(targets):,} items of their next baskets, {had.mean():.0%} taken before\n")
    found = rank(asks, {DUE: tell_due(known, start)}, known, queries, others)
    print_table("next basket, all items", found, owners)
    new = np.flatnonzero(~had)
    seen = [taken[starts[user] : starts[user + 1]] for user in places[new].tolist()]
    barred = [np.union1d(others[row], own) for row, own in zip(new.tolist(), seen, strict=True)]
    print_table(
        "next basket, items new to the user", rank(asks, fusions, known, queries.take(new), barred), owners[new]
    )


def rank(
    asks: Mapping[ScorerId, Fitted], fusions: Mapping[str, Fitted], known: FitData, queries: Queries,
    excluded: list[NDArray[np.int64]],
) -> Ranks:  # fmt: skip
    """Rank the answers by every scorer and fusion."""
    assert known.interactions is not None
    every: dict[str, Fitted] = {str(scorer): ask for scorer, ask in asks.items()}
    every |= fusions
    counts = Popularity(half_life_days=_HALF_LIFE)
    dated = known.interactions.take(np.isfinite(known.interactions.times))
    days, place = np.unique(dated.times // SECONDS_PER_DAY, return_inverse=True)
    by_day = dated.to_csr(len(known.catalog))[:0]  # the kind of matrix; each day is a row of what was taken on it
    by_day = type(by_day)((np.ones(len(dated), np.float32), (place, dated.items)), shape=(len(days), by_day.shape[1]))
    recent = counts.fit(by_day, times=days * SECONDS_PER_DAY).score_baskets(by_day[:1])[0]
    every[RECENT] = lambda part: np.tile(recent, (len(part), 1))
    every[LAST] = follow(known)
    ranks: dict[str, list[NDArray[np.float64]]] = {label: [] for label in every}
    done = 0
    for part in split_blocks(queries):
        barred = excluded[done : done + len(part)]
        for label, ask in every.items():
            ranks[label].append(metrics.midranks(ask(part), part.targets, barred))
        done += len(part)
    return {label: np.concatenate(own) for label, own in ranks.items()}


def tell_due(known: FitData, start: float) -> Fitted:
    """Score what a user took before by the chance that it is taken again within 14 days; the rest has no score."""
    assert known.interactions is not None
    size = len(known.catalog)
    history = PurchaseHistory.of(known.interactions, np.arange(size))
    day = float(np.floor(start / SECONDS_PER_DAY))
    pairs = RepurchaseModel.fit(history, day).predict(history, day)
    starts, chances = np.searchsorted(pairs.users, np.arange(len(known.interactions.user_ids) + 1)), pairs.within(14)

    def ask(queries: Queries) -> NDArray[np.float32]:
        scores = np.full((len(queries), size), np.nan, np.float32)
        for row, group in enumerate(queries.groups.tolist()):
            user = known.user_rows.get(group, -1)
            own = slice(starts[user], starts[user + 1]) if user >= 0 else slice(0, 0)
            scores[row, pairs.things[own]] = chances[own]
        return scores

    return ask


def follow(known: FitData) -> Fitted:
    """Score items by how often they are in the basket after one with the items of the user's last: a Markov chain."""
    assert known.interactions is not None
    from scipy import sparse

    own = known.interactions.take(known.interactions.users >= 0)
    order = np.lexsort((own.items, own.baskets, own.times, own.users))
    users, baskets, items = own.users[order], own.baskets[order], own.items[order]
    turn = np.cumsum(np.r_[True, (users[1:] != users[:-1]) | (baskets[1:] != baskets[:-1])]) - 1
    shape = (turn[-1] + 1, len(known.catalog))
    held = sparse.csr_array((np.ones(len(turn), np.float32), (turn, items)), shape=shape)
    held.data[:] = 1
    of = users[np.r_[True, turn[1:] != turn[:-1]]]
    next_to = np.flatnonzero(of[1:] == of[:-1])
    counts = sparse.csr_array(held[next_to].T @ held[next_to + 1])
    share = sparse.diags_array(1 / np.maximum(np.asarray(held[next_to].sum(axis=0)).ravel(), 1)) @ counts
    last = {int(user): row for row, user in enumerate(of.tolist())}

    def ask(queries: Queries) -> NDArray[np.float32]:
        scores = np.full((len(queries), shape[1]), np.nan, np.float32)
        for row, group in enumerate(queries.groups.tolist()):
            if (user := known.user_rows.get(group)) in last:
                scores[row] = sparse.csr_array(held[[last[user]]] @ share).toarray()[0]
        return scores

    return ask


def print_table(what: str, ranks: Ranks, groups: NDArray[np.str_]) -> None:
    """Print NDCG@10 and R@10 with intervals over users, and p of the difference to the last fusion or to EASE."""
    beside = WITHOUT if WITHOUT in ranks else "EASE"
    values = {label: metrics.per_query(own, "ndcg@10") for label, own in ranks.items()}
    print(f"| {what} | NDCG@10 | 95 % | R@10 | 95 % | p to {beside} |\n|---|---|---|---|---|---|")
    for label in sorted(ranks, key=lambda one: -values[one].mean()):
        recall = metrics.per_query(ranks[label], "r@10")
        cells = []
        for own in (values[label], recall):
            low, high = metrics.bootstrap_interval(own, groups)
            cells += [f"{own.mean():.4f}", f"{low:.4f} to {high:.4f}"]
        p = "" if label == beside else f"{metrics.paired_permutation(values[label], values[beside], groups):.4f}"
        print(f"| {label} | {' | '.join(cells)} | {p} |")
    print(flush=True)


if __name__ == "__main__":
    main()
