"""Encoding in batches: who goes together, who is remembered, who is turned away and who waits no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from peft_combo.recommender.explanations import FusedScores
from peft_combo.serving.batching import EncodeBatcher
from peft_combo.serving.drift import Drift
from peft_combo.serving.errors import NotReady, Overloaded, TimedOut, TooLarge
from peft_combo.serving.score_batching import ScoreBatcher, WaitingContext
from peft_combo.serving.turns import Turns


class Adapter:
    """As much of an adapter as the batcher looks at."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


class Encoder:
    """Encodes a text as its length and its adapter's number; waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()

    def __call__(self, texts: Sequence[str], adapter: Any) -> NDArray[np.float32]:
        self.batches.append((list(texts), adapter))
        self.entered.set()
        assert self.go.wait(20)
        if "broken" in texts:
            raise RuntimeError("made to fail")
        number = 0 if adapter is None else int(adapter.digest)
        return np.array([[len(text), number] for text in texts], np.float32)


def ask_later(batcher: EncodeBatcher, texts: list[str], adapter: Any, found: dict[str, Any]) -> threading.Thread:
    def ask() -> None:
        try:
            found[texts[0]] = batcher.encode(texts, adapter).tolist()
        except Exception as error:
            found[texts[0]] = error

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def wait_for(batcher: EncodeBatcher, depth: int) -> None:
    for _ in range(1000):
        if batcher.measure().queue_depth == depth:
            return
        threading.Event().wait(0.01)
    raise AssertionError(batcher.measure())


def test_what_waits_goes_together_by_adapter_and_is_remembered() -> None:
    encoder, one, two = Encoder(), Adapter("1"), Adapter("2")
    batcher = EncodeBatcher(encoder, wait_ms=0, most_texts=4)
    encoder.go.clear()
    found: dict[str, Any] = {}
    threads = [ask_later(batcher, ["first"], None, found)]
    assert encoder.entered.wait(10)  # busy: what comes now waits
    for texts, adapter in ((["a", "bb"], one), (["ccc"], two), (["dddd", "a"], one), (["eeeee"], one)):
        depth = batcher.measure().queue_depth + len(texts)
        threads.append(ask_later(batcher, texts, adapter, found))
        wait_for(batcher, depth)
    encoder.go.set()
    for thread in threads:
        thread.join()
    assert encoder.batches == [(["first"], None), (["a", "bb", "dddd"], one), (["ccc"], two), (["eeeee"], one)]
    assert found["a"] == [[1, 1], [2, 1]]
    assert found["dddd"] == [[4, 1], [1, 1]]
    assert found["ccc"] == [[3, 2]]
    assert batcher.encode(["bb", "ccc"], one).tolist() == [[2, 1], [3, 1]]  # "bb" is remembered, of `two` nothing is
    assert encoder.batches[-1] == (["ccc"], one)
    batcher.forget("1")
    batcher.encode(["bb"], one)
    assert encoder.batches[-1] == (["bb"], one)
    figures = batcher.measure()
    assert (figures.batches, figures.batch_texts, figures.cache_hits) == (6, 8, 1)
    batcher.close()


def test_a_full_queue_turns_away_and_says_when_to_come_back() -> None:
    encoder = Encoder()
    batcher = EncodeBatcher(encoder, wait_ms=0, queue_texts=3, timeout=20)
    encoder.go.clear()
    found: dict[str, Any] = {}
    threads = [ask_later(batcher, ["busy"], None, found)]
    assert encoder.entered.wait(10)
    threads.append(ask_later(batcher, ["a", "b", "c"], None, found))
    wait_for(batcher, 3)
    with pytest.raises(Overloaded, match="3 texts wait") as caught:
        batcher.encode(["d"], None)
    assert caught.value.retry_after > 0
    with pytest.raises(TooLarge, match="At most 3 texts"):
        batcher.encode(["1", "2", "3", "4"], None)
    encoder.go.set()
    for thread in threads:
        thread.join()
    assert batcher.encode(["d"], None).tolist() == [[1, 0]]
    assert batcher.measure().rejected == 1
    batcher.close()


def test_who_waits_too_long_is_told_and_not_encoded() -> None:
    encoder = Encoder()
    batcher = EncodeBatcher(encoder, wait_ms=0, text_chars=10)
    encoder.go.clear()
    found: dict[str, Any] = {}
    thread = ask_later(batcher, ["busy"], None, found)
    assert encoder.entered.wait(10)
    with pytest.raises(TimedOut, match=r"longer than 0\.05 s"):
        batcher.encode(["late"], None, timeout=0.05)
    encoder.go.set()
    thread.join()
    assert batcher.encode(["later"], None).tolist() == [[5, 0]]
    assert [texts for texts, _ in encoder.batches] == [["busy"], ["later"]]
    with pytest.raises(TooLarge, match="at most 10 characters"):
        batcher.encode(["x" * 11], None)
    batcher.close()


def test_a_failure_reaches_who_asked_and_nobody_else() -> None:
    batcher = EncodeBatcher(Encoder(), wait_ms=0)
    with pytest.raises(RuntimeError, match="made to fail"):
        batcher.encode(["broken"], None)
    assert batcher.encode(["well"], None).tolist() == [[4, 0]]
    batcher.close()
    with pytest.raises(NotReady):
        batcher.encode(["after"], None)


def test_drift_is_nothing_until_traffic_changes() -> None:
    drift = Drift()
    rng = np.random.default_rng(0)
    for score in rng.normal(1, 0.5, 300):
        drift.add_score("r", float(score))
    vectors = np.tile(np.array([[1, 0]], np.float32), (300, 1)) + rng.normal(0, 0.01, (300, 2)).astype(np.float32)
    drift.add_vectors("d", vectors)
    calm = drift.measure("r", "d")
    assert calm["scores"] < 0.5
    assert calm["query_vectors"] < 0.01
    for _ in range(300):
        drift.add_score("r", 4.0)
    drift.add_vectors("d", np.tile(np.array([[0, 1]], np.float32), (300, 1)))
    changed = drift.measure("r", "d")
    assert changed["scores"] > 3
    assert changed["query_vectors"] > 0.3
    drift.drop("r", "d")
    assert drift.measure("r", "d") == {}


def test_turns_are_taken_one_at_a_time_and_in_order() -> None:
    turns, order, inside = Turns(), [], []
    turns.__enter__()

    def take(number: int) -> None:
        with turns:
            inside.append(number)
            assert len(inside) == 1
            order.append(number)
            inside.remove(number)

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.__exit__(None, None, None)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with turns:  # and it is free again
        pass


class _Counting:
    """A recommender that notes what it scores at once, and cannot score row 9."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.depths: list[int | None] = []

    def score_contexts(self, asked: list[tuple[Any, str | None]], depth: int | None = None) -> list[FusedScores]:
        rows = [int(row[0]) for row, _ in asked]
        self.passes.append(rows)
        self.depths.append(depth)
        if 9 in rows:
            raise ValueError("row 9")
        return [FusedScores(np.full(3, row, np.float32), {}) for row in rows]


def test_contexts_in_line_are_scored_in_one_pass_and_each_finds_its_own_fault() -> None:
    batcher, one, other = ScoreBatcher(most=3), _Counting(), _Counting()
    line = [WaitingContext(cast(Any, one), np.array([row]), None) for row in (1, 2, 3, 4)]
    foreign = WaitingContext(cast(Any, other), np.array([7]), None)
    with ExitStack() as stack:
        for waiting in (line[0], foreign, *line[1:]):
            stack.enter_context(batcher.stand_in_line(waiting))
        assert [batcher.score(waiting).scores[0] for waiting in line] == [1, 2, 3, 4]
        assert (one.passes, other.passes) == ([[1, 2, 3], [4]], [])  # of one release each
        assert batcher.score(foreign).scores[0] == 7
    good, bad, gone = (WaitingContext(cast(Any, one), np.array([row]), None) for row in (5, 9, 6))
    with batcher.stand_in_line(good), batcher.stand_in_line(bad):
        with batcher.stand_in_line(gone):
            pass
        assert batcher.score(good).scores[0] == 5  # though it was scored beside one that cannot be
        with pytest.raises(ValueError, match="row 9"):
            batcher.score(bad)
    assert one.passes[2:] == [[5, 9], [5], [9]]


def test_contexts_whose_best_will_do_are_not_scored_beside_those_that_want_all() -> None:
    batcher, one = ScoreBatcher(), _Counting()
    depths = (10, None, 50, None)
    line = [WaitingContext(cast(Any, one), np.array([row]), None, depth) for row, depth in enumerate(depths)]
    with ExitStack() as stack:
        for waiting in line:
            stack.enter_context(batcher.stand_in_line(waiting))
        assert [batcher.score(waiting).scores[0] for waiting in line] == [0, 1, 2, 3]
    assert one.passes == [[0, 2], [1, 3]]
    assert one.depths == [50, None]  # the deepest of a pass
