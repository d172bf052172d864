"""Beam search on models whose probabilities are known: the right bundle, no invented one, and nothing twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from peft_combo.encoder.heads.completion import BundleHead, project_targets, score_completion
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.recipe.task import BundleTask, SequenceTask
from peft_combo.recommender.composing.generation import Sizes, Steps, build_steps, generate


def told(
    after: Mapping[tuple[int, ...], Sequence[float] | NDArray[np.float64]],
    ends: Mapping[tuple[int, ...], float] | None = None,
) -> Steps:
    """A model given by the probabilities of what comes next after each set, and of its being complete."""

    def steps(sets):  # type: ignore[no-untyped-def]
        keys = [tuple(rows.tolist()) for rows in sets]
        items = np.log(np.array([after[key] for key in keys])) + 3  # a constant in each row changes nothing
        odds = None if ends is None else np.array([math.log(ends[key] / (1 - ends[key])) for key in keys])
        return items, odds

    return steps


def any_rows(count: int, low: int, high: int) -> Sizes:
    return Sizes(np.ones(count, bool), low, high)


# Item 0 is the likeliest to begin with, yet leaves it open what follows; 1 is almost surely followed by 3.
TRAP = {
    (): [0.5, 0.4, 0.05, 0.05], (0,): [1, 0.02, 0.49, 0.49], (1,): [0.02, 1, 0.02, 0.96],
    (2,): [0.4, 0.3, 1, 0.3], (3,): [0.4, 0.3, 0.3, 1],
}  # fmt: skip


def test_greedy_search_walks_into_the_trap_and_a_beam_of_two_does_not() -> None:
    steps = told(TRAP)
    (greedy,) = generate(steps, (), any_rows(4, 2, 2), beam=1)
    assert greedy.added == (0, 2)  # as likely as (0, 3), and earlier
    assert greedy.log_probability == pytest.approx(math.log(0.5 * 0.49))
    (best,) = generate(steps, (), any_rows(4, 2, 2), beam=2)
    assert best.added == (1, 3)
    assert best.log_probability == pytest.approx(math.log(0.4 * 0.96))
    # A beam that keeps all sets adds the other way to it: first 3, then 1.
    (exact,) = generate(steps, (), any_rows(4, 2, 2), beam=99)
    assert exact.added == (1, 3)
    assert exact.log_probability == pytest.approx(math.log(0.4 * 0.96 + 0.05 * 0.3))


def random_model(
    count: int, seed: int
) -> tuple[Steps, dict[tuple[int, ...], NDArray[np.float64]], dict[tuple[int, ...], float]]:
    rng = np.random.default_rng(seed)
    sets = [rows for size in range(count + 1) for rows in itertools.combinations(range(count), size)]
    after = {rows: rng.dirichlet(np.full(count, 0.5)) + 1e-6 for rows in sets}
    ends = {rows: float(rng.uniform(0.1, 0.9)) for rows in sets}
    return told(after, ends), after, ends


@pytest.mark.parametrize("context", [(), (2,)])
def test_a_beam_of_everything_is_the_sum_over_all_orders(context: tuple[int, ...]) -> None:
    steps, after, ends = random_model(5, 7)
    allowed = np.array([True, True, True, False, True])
    low, high = 1, 3
    exact: dict[tuple[int, ...], float] = {}
    free = [row for row in range(5) if allowed[row] and row not in context]
    for size in range(low, high + 1):
        for order in itertools.permutations(free, size):
            probability, held = 1.0, list(context)
            for place, row in enumerate(order):
                left = [other for other in free if other not in held]
                weights = after[tuple(sorted(held))]
                if place >= low:
                    probability *= 1 - ends[tuple(sorted(held))]
                probability *= weights[row] / weights[left].sum()
                held.append(row)
            if size < high and len(held) < len(free) + len(context):
                probability *= ends[tuple(sorted(held))]
            exact[tuple(sorted(order))] = exact.get(tuple(sorted(order)), 0.0) + probability
    assert sum(exact.values()) == pytest.approx(1)
    found = generate(steps, context, Sizes(allowed, low, high), beam=1000, count=1000)
    assert {one.added: math.exp(one.log_probability) for one in found} == pytest.approx(exact)
    assert [one.added for one in found] == sorted(exact, key=lambda rows: -exact[rows])
    assert generate(steps, context, Sizes(allowed, low, high), beam=1000, count=2) == found[:2]


def test_no_item_twice_none_that_is_not_allowed_and_none_that_does_not_exist() -> None:
    favourite = np.array([100.0, 50, 1, 1, 1, 1])  # of all these, 0 is held, 1 is not allowed, 2 is unknown

    def steps(sets):  # type: ignore[no-untyped-def]
        scores = np.tile(favourite, (len(sets), 1))
        scores[:, 2] = np.nan
        return scores, None

    allowed = np.array([True, False, True, True, True, True])
    found = generate(steps, (0,), Sizes(allowed, 2, 2), beam=50, count=50)
    assert [one.added for one in found] == [(3, 4), (3, 5), (4, 5)]
    assert [math.exp(one.log_probability) for one in found] == pytest.approx([1 / 3] * 3)
    copies = np.array([0, 1, 2, 3, 3, 0])  # 4 is 3 again, and 5 is what is held
    assert [one.added for one in generate(steps, (0,), Sizes(allowed, 1, 1), count=9, copies=copies)] == [(3,), (4,)]
    assert generate(steps, (0,), Sizes(allowed, 2, 2), copies=copies) == []
    assert generate(steps, (0,), Sizes(allowed, 4, 4)) == []  # there are only three


def test_equally_probable_bundles_come_in_the_order_of_their_rows() -> None:
    def steps(sets):  # type: ignore[no-untyped-def]
        return np.zeros((len(sets), 6)), None

    found = generate(steps, (), any_rows(6, 3, 3), beam=99, count=4)
    assert [one.added for one in found] == [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 5)]


def test_the_end_decides_where_the_size_is_open_and_only_there() -> None:
    _, after, _ = random_model(4, 3)
    sets = [rows for size in range(5) for rows in itertools.combinations(range(4), size)]
    steps = told(after, {rows: 0.99 if len(rows) == 2 else 0.01 for rows in sets})
    assert len(generate(steps, (), any_rows(4, 1, 4), beam=99)[0].added) == 2
    size_told = generate(steps, (), any_rows(4, 3, 3), beam=99, count=9)
    assert size_told == generate(told(after), (), any_rows(4, 3, 3), beam=99, count=9)
    with pytest.raises(ValueError, match="cannot tell when a bundle is complete"):
        generate(told(after), (), any_rows(4, 1, 3))
    with pytest.raises(ValueError, match="at least 1"):
        generate(steps, (), any_rows(4, 1, 3), beam=0)


@torch.no_grad()
def test_a_head_is_asked_by_its_scores_and_its_end() -> None:
    vectors = functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1).numpy()
    head = SequenceHead(4, SequenceTask(width=8, temperature=0.5)).eval()
    head.size_log_odds.copy_(torch.arange(33.0))
    head.end.weight.fill_(0.3)
    items, ends = build_steps(head, vectors)([np.array([1, 4]), np.array([0, 2, 5])])
    contexts = np.array([[1, 4, -1], [0, 2, 5]])
    expected = score_completion(head, vectors, project_targets(head, vectors), contexts)
    np.testing.assert_allclose(items, expected / 0.5, rtol=1e-5)
    query = head.query(torch.from_numpy(vectors), torch.from_numpy(contexts))
    assert ends is not None
    np.testing.assert_allclose(ends, [2 + 0.3 * float(query[0].sum()), 3 + 0.3 * float(query[1].sum())], rtol=1e-5)
    assert build_steps(BundleHead(4, BundleTask()).eval(), vectors)([np.array([1])])[1] is None
    # From nothing: the items nearest to the begin token.
    head.begin.copy_(torch.from_numpy(vectors[3]))
    assert generate(build_steps(head, vectors), (), any_rows(6, 1, 1))[0].added == (3,)
