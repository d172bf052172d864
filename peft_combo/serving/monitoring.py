"""Monitoring: Prometheus metrics of requests, encoding, adapters, exposures and drift.

Owns the names of the metrics and how they are gathered from several processes. Knows nothing of how what they count
comes about.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

from peft_combo import __version__
from peft_combo.serving.answers import AdapterStatus, EngineFigures

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client: the folder where the processes of one service keep their figures."""

METRICS: dict[str, str] = {
    "peft_combo_request_seconds": "Seconds of a request from its first byte to its last, by route, category and code.",
    "peft_combo_requests_in_flight": "Requests that are being answered or wait for a thread.",
    "peft_combo_queue_depth": "Texts that wait to be encoded.",
    "peft_combo_queue_limit": "Texts that may wait to be encoded.",
    "peft_combo_encode_batches_total": "Passes of the encoder.",
    "peft_combo_encode_texts_total": "Texts that were encoded.",
    "peft_combo_encode_batch_size": "Texts of a pass of the encoder, mean of the last seconds.",
    "peft_combo_rejected_total": "Requests that were turned away, by reason.",
    "peft_combo_adapter_info": "1 for each version in use, 0 for one that was.",
    "peft_combo_adapter_share": "Share of the traffic of an alias that an arm gets, per cent.",
    "peft_combo_adapter_memory_bytes": "Memory of a loaded adapter.",
    "peft_combo_adapter_swaps_total": "Changes of an alias, by result.",
    "peft_combo_adapter_swap_seconds": "Seconds that the last exchange of an alias took.",
    "peft_combo_cache_hits_total": "Query vectors that were remembered.",
    "peft_combo_cache_misses_total": "Query vectors that had to be made.",
    "peft_combo_answers_total": "Answers by who gave them: fusion, text, cf, popularity.",
    "peft_combo_fallbacks_total": "Answers after others had nothing to say, by who gave them instead.",
    "peft_combo_drift": "Distance of recent query vectors and scores from the reference, by what is compared.",
    "peft_combo_quality": "Quality of a version in use as its manifest has it, by metric and stage.",
    "peft_combo_exposures_total": "Answers that were shown, or by a shadow computed, by alias and arm.",
    "peft_combo_exposures_dropped_total": "Exposures that were not written, because the journal was full.",
    "peft_combo_feedback_total": "Feedback by alias, arm and kind.",
    "peft_combo_items": "Items that can be found: of the catalogue, upserted, deleted.",
    "peft_combo_ready": "1 where every alias answered its warm-up request.",
    "peft_combo_build_info": "Version of the program.",
}
"""Every metric by its exposed name, with its help."""

_SECONDS = (
    .0005, .001, .002, .003, .005, .0075, .01, .015, .02, .03, .04, .05, .075, .1, .15, .25, .5, 1., 2.5, 5., 10., 30.,
)  # fmt: skip


class Monitor:
    """Counts and measures; `scrape` gives the text that Prometheus reads.

    In one process of several the figures are kept in the folder of `MULTIPROCESS`, and any process tells those of all.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self._shared = MULTIPROCESS in os.environ
        self._registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads and several processes have not
        self._seen: dict[tuple[str, ...], float] = defaultdict(float)
        self._labels: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._latest: Mapping[str, Any] = {}
        self.requests = Histogram(
            "peft_combo_request_seconds", METRICS["peft_combo_request_seconds"], ("route", "category", "code"),
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._gauges = {
            name: Gauge(name, METRICS[name], labels, registry=self._registry, multiprocess_mode=mode)
            for name, labels, mode in _GAUGES
        }
        self._counters = {
            name: Counter(name, METRICS[name], labels, registry=self._registry) for name, labels in _COUNTERS
        }
        self._set("peft_combo_build_info", {(__version__,): 1.0})
        self._set("peft_combo_ready", {(): 0.0})

    def observe(self, route: str, category: str, code: int, seconds: float) -> None:
        """Count a request that was answered, well or not."""
        self.requests.labels(route, category, str(code)).observe(seconds)

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def update(self, figures: EngineFigures, adapters: Iterable[AdapterStatus], ready: bool, in_flight: int) -> None:
        """Take over the engine's figures; what only grows there is added by what it grew since the last time."""
        batches = self._grow("peft_combo_encode_batches_total", (), figures.batches)
        texts = self._grow("peft_combo_encode_texts_total", (), figures.batch_texts)
        self._grow("peft_combo_cache_hits_total", (), figures.cache_hits)
        self._grow("peft_combo_cache_misses_total", (), figures.cache_misses)
        for who, count in figures.answered_by.items():
            self._grow("peft_combo_answers_total", (who,), count)
        for swap in reversed(figures.swaps):
            if swap.time > self._seen[("swaps",)]:
                self._seen[("swaps",)] = swap.time
                self.count("peft_combo_adapter_swaps_total", swap.result.replace(" ", "_"))
                self._set("peft_combo_adapter_swap_seconds", {(swap.alias,): swap.swap_ms / 1000}, keep=True)
        gauges: dict[str, dict[tuple[str, ...], float]] = {
            "peft_combo_requests_in_flight": {(): in_flight},
            "peft_combo_queue_depth": {(): figures.queue_depth},
            "peft_combo_queue_limit": {(): figures.queue_limit},
            "peft_combo_ready": {(): float(ready)},
            "peft_combo_drift": {(name,): value for name, value in figures.drift.items()},
            "peft_combo_adapter_memory_bytes": {(name,): size for name, size in figures.adapter_bytes.items()},
            "peft_combo_items": {
                ("catalogue",): figures.catalogue, ("upserted",): figures.upserted, ("deleted",): figures.deleted,
            },
            **_describe_adapters(adapters),
        }  # fmt: skip
        if batches:
            gauges["peft_combo_encode_batch_size"] = {(): texts / batches}
        for name, values in gauges.items():
            self._set(name, values)

    def _grow(self, name: str, labels: tuple[str, ...], total: float) -> float:
        key = (name, *labels)
        by = max(0.0, total - self._seen[key])
        self._seen[key] = total
        if by:
            self.count(name, *labels, by=by)
        return by

    def _set(self, name: str, values: Mapping[tuple[str, ...], float], keep: bool = False) -> None:
        """Set a gauge; labels that it had and has no more become 0, for what was exposed once stays in the files."""
        gauge = self._gauges[name]
        gone = set() if keep else self._labels[name] - set(values)
        self._labels[name] |= set(values)
        for labels, value in (*values.items(), *((labels, 0.0) for labels in gone)):
            (gauge.labels(*labels) if labels else gauge).set(value)

    def scrape(self) -> tuple[bytes, str]:
        """Return the figures of all processes of the service, and their content type."""
        return generate_latest(self._gather()), CONTENT_TYPE_LATEST

    def _gather(self) -> CollectorRegistry:
        if not self._shared:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    def summarize(self) -> dict[str, Any]:
        """Return counts, errors and percentiles by route, counts by arm, fallbacks by who answered: for the page."""
        found = {metric.name: metric.samples for metric in self._gather().collect()}
        routes: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        counts: dict[str, float] = defaultdict(float)
        errors: dict[str, float] = defaultdict(float)
        for sample in found.get("peft_combo_request_seconds", ()):
            route = sample.labels["route"]
            if sample.name.endswith("_bucket"):
                routes[route][float(sample.labels["le"])] += sample.value
            elif sample.name.endswith("_count"):
                counts[route] += sample.value
                errors[route] += sample.value * (sample.labels["code"] >= "400")
        told = [
            {
                "route": route, "count": int(counts[route]), "errors": int(errors[route]),
                **{f"p{round(100 * at)}_ms": _interpolate(routes[route], at) for at in (0.5, 0.95, 0.99)},
            }
            for route in sorted(counts)
        ]  # fmt: skip
        arms: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"exposures": 0, "feedback": 0})
        for name in ("exposures", "feedback"):
            for sample in found.get(f"peft_combo_{name}", ()):
                if sample.name.endswith("_total"):
                    arms[sample.labels["alias"], sample.labels["arm"]][name] += int(sample.value)
        fallbacks = {
            sample.labels["answered_by"]: int(sample.value)
            for sample in found.get("peft_combo_fallbacks", ()) if sample.name.endswith("_total")
        }  # fmt: skip
        return {"routes": told, "arms": arms, "fallbacks": fallbacks}


_GAUGES: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("peft_combo_requests_in_flight", (), "livesum"),
    ("peft_combo_queue_depth", (), "livesum"),
    ("peft_combo_queue_limit", (), "livesum"),
    ("peft_combo_encode_batch_size", (), "livemax"),
    ("peft_combo_adapter_info", ("alias", "version", "digest", "arm"), "livemax"),
    ("peft_combo_adapter_share", ("alias", "arm"), "livemin"),
    ("peft_combo_adapter_memory_bytes", ("version",), "livesum"),
    ("peft_combo_adapter_swap_seconds", ("alias",), "livemax"),
    ("peft_combo_drift", ("of",), "livemax"),
    ("peft_combo_quality", ("version", "metric", "split"), "livemax"),
    ("peft_combo_items", ("kind",), "livemax"),
    ("peft_combo_ready", (), "livemin"),
    ("peft_combo_build_info", ("version",), "livemax"),
)

_COUNTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("peft_combo_encode_batches_total", ()),
    ("peft_combo_encode_texts_total", ()),
    ("peft_combo_rejected_total", ("reason",)),
    ("peft_combo_adapter_swaps_total", ("result",)),
    ("peft_combo_cache_hits_total", ()),
    ("peft_combo_cache_misses_total", ()),
    ("peft_combo_answers_total", ("answered_by",)),
    ("peft_combo_fallbacks_total", ("answered_by",)),
    ("peft_combo_exposures_total", ("alias", "arm")),
    ("peft_combo_exposures_dropped_total", ()),
    ("peft_combo_feedback_total", ("alias", "arm", "kind")),
)


def _describe_adapters(adapters: Iterable[AdapterStatus]) -> dict[str, dict[tuple[str, ...], float]]:
    info: dict[tuple[str, ...], float] = {}
    shares: dict[tuple[str, ...], float] = {}
    quality: dict[tuple[str, ...], float] = {}
    for status in adapters:
        for name, arm in status.arms.items():
            info[status.alias, arm.version, arm.digest, name] = 1.0
            shares[status.alias, name] = arm.share
            for stage, metric, value in _list_figures(arm.metrics):
                quality[arm.version, metric, stage] = value
    return {"peft_combo_adapter_info": info, "peft_combo_adapter_share": shares, "peft_combo_quality": quality}


def _list_figures(metrics: Mapping[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Yield stage (before, after), metric and value of a manifest's figures."""
    for stage, values in metrics.items():
        for metric, value in values.items() if isinstance(values, Mapping) else ():
            number = value.get("value") if isinstance(value, Mapping) else value
            if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                yield stage, metric, float(number)


def _interpolate(buckets: Mapping[float, float], at: float) -> float | None:
    """Return a percentile in ms from cumulative buckets, linear within one; None where there is nothing."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    wanted = at * buckets[bounds[-1]]
    before, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if math.isinf(bound):
                return round(1000 * below, 2)
            inside = buckets[bound] - before
            return round(1000 * (below + (bound - below) * (wanted - before) / inside), 2) if inside else None
        before, below = buckets[bound], bound
    return None


def watch(act: Callable[[], None], seconds: float) -> Callable[[], None]:
    """Call `act` every so many seconds from a thread; return what ends that."""
    import threading

    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            act()

    threading.Thread(target=run, name="monitor", daemon=True).start()
    return done.set
