"""Answers of the service: results with where they come from, and what became of items, adapters and jobs.

Owns the shape of what routes send, as values that turn into JSON. Knows nothing of how an answer is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Arm = Literal["prod", "next", "shadow"]
AnsweredBy = Literal["fusion", "text", "cf", "popularity"]
"""Who answered: all scorers fused; the likeness of texts alone; what others took alone; what is taken most."""

SwapResult = Literal["promoted", "split", "shadow", "rolled back", "refused", "unloaded"]
"""How a change of an alias went: "split" and "shadow" leave prod as it is."""


@dataclass(frozen=True)
class Origin:
    """Where an answer comes from.

    Attributes:
        alias: what was asked for, as in fashion@prod. version: the adapter behind it, as in fashion@v3; "frozen" for
            the encoder without adapter. digest: of this adapter; of the encoder where there is none.
        release: digest of adapter, item vectors and fitted recommender together: answers with the same one are
            comparable.
        answered_by: see `AnsweredBy`.
        fallbacks: what was tried before and had nothing to say, best first.
    """

    alias: str
    version: str
    digest: str
    release: str
    arm: Arm
    answered_by: AnsweredBy = "fusion"
    fallbacks: tuple[AnsweredBy, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the service answers.

    Attributes:
        results: `Suggestion` (with `category`) for single items, `Recommendation` (with `prices`) for bundles; JSON
            values.
        next_cursor: gives what comes next; None where that was all.
        took_ms: from the request to the answer, waiting included.
        notes: what was noticed, in sentences: a user who is not known, a fallback.
        timing: per stage the milliseconds it took ("queue", "encode", "score", "shadow").
        propensities: per result the probability of it at its place given those before it; () where nothing was drawn.
    """

    request_id: str
    results: tuple[dict[str, Any], ...]
    next_cursor: str | None
    origin: Origin
    took_ms: float
    notes: tuple[str, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)
    propensities: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the answer as JSON values, in the order that routes send."""
        origin = asdict(self.origin)
        origin["fallbacks"] = list(self.origin.fallbacks)
        return {
            "request_id": self.request_id, "results": list(self.results), "next_cursor": self.next_cursor,
            "took_ms": round(self.took_ms, 3), "origin": origin, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class ItemOutcome:
    """What became of one item that was put.

    Attributes:
        status: "created", "updated" or "refused". error: why it was refused.
        note: what does not go by the change yet, in a sentence; None where all does.
    """

    item_id: str
    status: Literal["created", "updated", "refused"]
    error: str | None = None
    note: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the item was taken in."""
        return self.status != "refused"


@dataclass(frozen=True)
class ArmStatus:
    """One release that takes part of the traffic of an alias.

    Attributes:
        share: per cent of the users who get it; 0 for a shadow.
        requests: answers it gave (a shadow: computed) since it was taken into use.
        mean_ms: what they took on the mean.
        nbytes: what adapter and item vectors hold in memory.
        metrics: quality figures of the manifest, before and after tuning.
    """

    version: str
    digest: str
    release: str
    share: float
    since: float
    requests: int
    mean_ms: float | None
    nbytes: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A promotion under way or done.

    Attributes:
        state: "building", "done" or "refused". stage: what it is at. error: why it was refused.
        started, finished: seconds since 1970; finished is None while it runs.
    """

    job_id: str
    alias: str
    version: str
    state: Literal["building", "done", "refused"]
    stage: str
    started: float
    finished: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class AdapterStatus:
    """One alias with its arms.

    Attributes:
        mode: who moves it: "watch" the store, "told" a promotion, "fixed" nobody.
        previous: the version a rollback goes back to; None where there is none.
        job: the promotion under way, or the last one.
    """

    alias: str
    mode: Literal["watch", "told", "fixed"]
    arms: Mapping[str, ArmStatus]
    previous: str | None
    ready: bool
    job: Job | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Swap:
    """One change of an alias: when (seconds since 1970), from and to which version, how it went, and how long it took.

    Attributes:
        build_ms: until the release was built and warm. swap_ms: the exchange itself.
    """

    time: float
    alias: str
    before: str | None
    after: str
    result: SwapResult
    build_ms: float
    swap_ms: float
    error: str | None = None


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as it is given to who logs exposures, shadows included.

    Attributes:
        route: "recommend", "complete" and so on. user: outside id as it was given; None for nobody.
        context: ids of the items that were given.
        propensities: per result the probability that it was shown at its place; 1 where nothing is explored.
    """

    route: str
    user: str | None
    context: tuple[str, ...]
    answer: Answer
    propensities: tuple[float, ...]


@dataclass(frozen=True)
class EngineFigures:
    """Counts and gauges of the engine, at one moment; counters only grow.

    Attributes:
        queue_depth, queue_limit: texts that wait to be encoded, and how many may.
        batches, batch_texts: encoder passes, and texts in them.
        cache_hits, cache_misses: of query vectors.
        rejected: requests turned away, by reason. answered_by: answers by who gave them.
        drift: mean distance of recent query vectors and scores from those of the reference, by name.
        swaps: the last changes, newest first.
        adapter_bytes: what loaded adapters hold, by version.
        catalogue, upserted, deleted: numbers of items.
    """

    queue_depth: int
    queue_limit: int
    batches: int
    batch_texts: int
    cache_hits: int
    cache_misses: int
    rejected: Mapping[str, int]
    answered_by: Mapping[str, int]
    drift: Mapping[str, float]
    swaps: tuple[Swap, ...]
    adapter_bytes: Mapping[str, int]
    catalogue: int
    upserted: int
    deleted: int
