"""Service: answers requests from the release of an alias, takes in items and events, promotes and rolls back.

Owns the order in which a request is answered and what is kept between requests. Knows nothing of HTTP, keys or tables:
routes hand it values, and the state that is to survive is handed to it. Any number of threads may use one service.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.errors import PeftComboError, did_you_mean, shorten
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender.workspace import Workspace
from peft_combo.serving.afterwards import Afterwards
from peft_combo.serving.aliases import choose_aliases
from peft_combo.serving.answering import Answerer, Route
from peft_combo.serving.answers import AdapterStatus, Answer, EngineFigures, ItemOutcome, Job, Origin, ShownAnswer
from peft_combo.serving.arms import DeployedRelease
from peft_combo.serving.batching import EncodeBatcher
from peft_combo.serving.catalogue import find_items, get_item, list_examples, list_versions
from peft_combo.serving.deployment import Deployments
from peft_combo.serving.drawing import ListDrawer
from peft_combo.serving.drift import Drift
from peft_combo.serving.encoders import Encoders
from peft_combo.serving.engine_config import EngineConfig
from peft_combo.serving.errors import BadRequest, NotReady, UnknownAdapter, UnknownItem
from peft_combo.serving.live_counts import LiveCounts
from peft_combo.serving.live_events import LiveEvents, check_event
from peft_combo.serving.live_items import LiveItems
from peft_combo.serving.release import FROZEN, ReleaseBuilder
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.state import ItemRow, State
from peft_combo.serving.texts import TextTasks
from peft_combo.store.adapter_store import AdapterStore

_LOG = logging.getLogger(__name__)
_FOLD_SECONDS = 5.0  # between counting what was bought
_ROWS = 500  # rows of the state taken in at a time


class Service:
    """The engine of the service; `open` makes one from settings."""

    def __init__(self, space: Workspace, state: State, config: EngineConfig, on_note: Callable[[str], None]) -> None:
        dataset, bank = space.dataset, space.bank
        self.dataset, self._state, self._config, self._on_note = dataset, state, config, on_note
        self._bank: AdapterBank = bank
        self._store: AdapterStore = space.store
        self._encoders = Encoders(bank.backbone, config.encoder, dataset, space.split, config.fitted / "encoders")
        self._batcher = EncodeBatcher(
            self._encoders,
            wait_ms=config.batch_ms, most_texts=config.batch_texts, queue_texts=config.queue_texts,
            timeout=config.encode_timeout, cached=config.cached_queries, text_chars=config.text_chars,
        )  # fmt: skip
        self._counts = LiveCounts(dataset.catalog)
        self._items = LiveItems(dataset, self._batcher, self._counts)
        self._events = LiveEvents(state)
        self._forgotten: frozenset[str] = frozenset()
        self._drawer = ListDrawer(config.explore, state)
        self._answerer = Answerer(self._events, state.identify, lambda key: key in self._forgotten, self._drawer)
        self._drift = Drift()
        builder = ReleaseBuilder(
            dataset, space.split, bank, space.cache, config.fitted, space.recipe.seed, self._encoders,
            self._batcher, self._drift, on_note,
        )  # fmt: skip
        self._deployments = Deployments(builder, space.store, state, self._items, config.follow, on_note)
        self._texts = TextTasks(bank, self._batcher, dataset, space.cache)
        self._answered_by: Counter[str] = Counter()
        self._afterwards = Afterwards()
        self._items_seq = self._forgotten_seq = 0
        self._items_lock = threading.Lock()
        self._under_way = 0
        self._idle = threading.Condition()
        self._closing = threading.Event()
        self._started = self._uncounted = False
        self._follower = threading.Thread(target=self._follow, name="follow", daemon=True)

    @classmethod
    def open(cls, config: EngineConfig, state: State, on_note: Callable[[str], None] = print) -> Service:
        """Load data, encoder and store, build and warm a release for every alias, and take in what the state holds.

        Args:
            on_note: told what is noticed, in sentences.
        Raises:
            PeftComboError: something that is needed is not there; nothing was started.
        """
        recipe = load_recipe(config.recipe, config.overrides, config.data).ready()
        space = Workspace.of(recipe, store=config.store, cache=config.vectors, on_note=on_note)
        service = cls(space, state, config, on_note)
        try:
            service.start(choose_aliases(config.adapters, recipe.category, space.store, state, on_note))
        except BaseException:
            service.close()
            raise
        return service

    def start(self, aliases: Sequence[str]) -> None:
        """Take in the state, build a release for every alias, and begin to follow what others change."""
        self._refresh()
        self._counts.add(self._state.events_since(0))
        self._drawer.refresh()
        for alias in aliases:
            self._deployments.load(alias)
        self._started = True
        self._follower.start()

    @property
    def ready(self) -> bool:
        """Whether every alias answered its warm-up request, and the service is not closing."""
        return self._started and not self._closing.is_set()

    # Answers. All raise DataError (a bad request), UnknownAdapter, CursorExpired, Overloaded, TimedOut or NotReady.

    def recommend(self, request: ServiceRequest) -> Answer:
        """Return single items for a user, items or a query, whichever are given; one result is a `Suggestion`."""
        return self._answer("recommend", request)

    def complete(self, request: ServiceRequest) -> Answer:
        """Return single items that complete `items`."""
        return self._answer("complete", request)

    def compose(self, request: ServiceRequest) -> Answer:
        """Return bundles; one result is a `Recommendation` with the price of each item in `prices`."""
        return self._answer("compose", request)

    def replace(self, request: ServiceRequest) -> Answer:
        """Return single items that could replace `swap` among `items`; `bundle_price` is of the bundle with it."""
        return self._answer("replace", request)

    def search(self, request: ServiceRequest) -> Answer:
        """Return items whose texts are most like `query`."""
        return self._answer("search", request)

    def rank(self, request: ServiceRequest) -> Answer:
        """Return `bundles` in the order of how well they go with items, user or query; see `compose`."""
        return self._answer("rank", request)

    # The encoder by itself. `adapter` is an alias that is served, or anything the store knows; None the first alias.

    def embed(self, texts: Sequence[str], adapter: str | None = None) -> tuple[NDArray[np.float32], Origin]:
        """Return unit vectors (B, D) of texts under an adapter."""
        with self._answering():
            live, origin = self._find_adapter(adapter)
            return self._texts.embed(texts, live), origin

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens texts have, special ones included."""
        return self._texts.count_tokens(texts)

    def tag(self, texts: Sequence[str], adapter: str | None = None) -> tuple[list[list[dict[str, Any]]], Origin]:
        """Return the entities of each text: {"text", "type", "start", "end"}; without a tagging adapter by lexicon."""
        with self._answering():
            live, origin = self._find_adapter(FROZEN if adapter is None else adapter)
            return self._texts.tag(texts, None if adapter is None else live), origin

    def classify(self, texts: Sequence[str], adapter: str) -> tuple[list[list[dict[str, Any]]], Origin]:
        """Return for each text {"label", "score", "chosen"} of every label, likeliest first."""
        with self._answering():
            live, origin = self._find_adapter(adapter)
            if live is None:
                raise BadRequest("adapter: expected one that was tuned to classify, found the frozen encoder.")
            return self._texts.classify(texts, live), origin

    def match(
        self, text: str, templates: Sequence[str], adapter: str | None = None, k: int = 5
    ) -> tuple[list[dict[str, Any]], Origin]:
        """Return the answer templates that fit a text best: {"index", "template", "score"}."""
        with self._answering():
            live, origin = self._find_adapter(adapter)
            return self._texts.match(text, templates, live, k), origin

    def rate(
        self,
        adapter: str,
        *,
        user: str | None = None,
        liked: Sequence[str] = (),
        items: Sequence[str] = (),
        k: int = 10,
    ) -> tuple[list[dict[str, Any]], Origin]:
        """Return how likely somebody is to take items: {"item_id", "title", "probability"}."""
        with self._answering():
            live, origin = self._find_adapter(adapter)
            if live is None:
                raise BadRequest("adapter: expected one that was tuned on ratings, found the frozen encoder.")
            if user is not None and self._state.identify(user) in self._forgotten:
                user = None
            return self._texts.rate(live, user, liked, items, k), origin

    # Items, events, persons.

    def find_items(
        self, words: str = "", limit: int = 20, cursor: str | None = None
    ) -> tuple[list[dict[str, Any]], str | None, int]:
        """Return items whose title or id holds every word, the cursor of what comes next, and how many there are.

        One item is {"item_id", "title", "slot", "category", "price"}.
        """
        return find_items(self._catalogue(), self._items.knows, words, limit, cursor)

    def get_item(self, item_id: str) -> dict[str, Any]:
        """Return one item as `find_items` does, with all its columns under "fields".

        Raises:
            UnknownItem: there is none.
        """
        self._require_item(item_id)
        return get_item(self._catalogue(), item_id)

    def list_examples(self) -> dict[str, Any]:
        """Return {"users", "baskets", "queries"} to try, at most six of each; nobody who asked to be forgotten."""
        return list_examples(self.dataset, lambda user: self._state.identify(user) in self._forgotten)

    def put_items(self, items: Sequence[Mapping[str, Any]]) -> list[ItemOutcome]:
        """Take items in, new or changed, each {"item_id", "title", ...columns}; what is accepted is stored and found.

        A change names only what changes. A faulty item costs itself and no other.

        Raises:
            StateError: the state cannot be written; nothing was taken in.
        """
        outcomes: list[ItemOutcome] = []
        rows: dict[str, ItemRow] = {}
        with self._answering(), self._items_lock:
            for values in items:
                item_id = values.get("item_id")
                name = item_id if isinstance(item_id, str) else ""
                try:
                    row = self._items.check({**dict(rows[name].fields), **values} if name in rows else values)
                except PeftComboError as error:
                    outcomes.append(ItemOutcome(shorten(name), "refused", str(error)))
                    continue
                known = name in rows or self._items.knows(name)
                rows[name] = row
                outcomes.append(ItemOutcome(name, "updated" if known else "created"))
            self._state.put_items(list(rows.values()))
            self._take_items()
        return self._items.note_late(outcomes, self._deployments.releases())

    def delete_item(self, item_id: str) -> None:
        """Hide an item until it is put again.

        Raises:
            UnknownItem: there is none.
        """
        self._require_item(item_id)
        with self._answering(), self._items_lock:
            self._state.put_items([ItemRow(item_id, {}, deleted=True)])
            self._take_items()

    def add_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Store what users did and use it at once; return how many were new.

        Args:
            events: each {"user", "item_id", "kind", "value"?, "time"?, "event_id"?}. Kinds: view, purchase, rating
                (`value` 1 to 5), rejected. What is of an item that is not known is stored and waits for it.
        Raises:
            DataError: one cannot be read; none was stored.
        """
        rows = [check_event(one, self._state.identify) for one in events]
        with self._answering():
            count = self._state.add_events(rows)
            self._refresh_events()
        return count

    def forget_user(self, user: str, actor: str = "") -> dict[str, int]:
        """Remove a person from state, caches and what is learned live; return what was removed, by table."""
        key = self._state.identify(user)
        counts = dict(self._state.forget(key, actor or "nobody"))
        self._forget(key)
        return counts

    # Adapters.

    def list_adapters(self) -> list[AdapterStatus]:
        """Return every alias that is served, with its arms."""
        return self._deployments.list_status()

    def list_versions(self) -> list[dict[str, Any]]:
        """Return the versions in the store: version, digest, method, created, bytes, metrics, aliases, loaded."""
        return list_versions(self._store, {one.version for one in self._deployments.releases()})

    def load(self, alias: str, actor: str = "") -> AdapterStatus:
        """Serve one more alias."""
        return self._deployments.load(alias, actor)

    def promote(
        self, alias: str, version: str, *, split: Mapping[str, float] | None = None, shadow: bool = False,
        wait: bool = True, actor: str = "",
    ) -> AdapterStatus:  # fmt: skip
        """Let an alias mean another version, once its release is built and warm; what is in use serves until then.

        Args:
            split: shares in per cent, {"prod": 90, "next": 10}: the version is then the arm `next`. None: all of it.
            shadow: the version answers beside prod, unseen.
            wait: return when it is in use; else at once, with the job under way.
            actor: who asked, for the audit log.
        Raises:
            UnknownAdapter: there is no such alias or version. Conflict: the alias is being changed, or fixed.
            RefusedRelease: the version cannot be used, and nothing has changed.
        """
        return self._deployments.promote(alias, version, split, shadow, wait, actor)

    def rollback(self, alias: str, *, actor: str = "") -> AdapterStatus:
        """End a split or shadow; without one, let the alias mean what it meant before."""
        return self._deployments.rollback(alias, actor)

    def unload(self, alias: str, *, actor: str = "") -> None:
        """Stop serving an alias; the last one stays."""
        self._deployments.unload(alias, actor)

    def find_job(self, job_id: str) -> Job:
        """Return a promotion under way or done."""
        return self._deployments.find_job(job_id)

    # Watching.

    def measure(self) -> EngineFigures:
        """Return counts and gauges."""
        batch, (upserted, deleted) = self._batcher.measure(), self._items.count()
        release = self._deployments.find(None, "")[2].release.release
        drift = self._drift.measure(release, self._bank.backbone.fingerprint)
        return EngineFigures(
            batch.queue_depth, batch.queue_limit, batch.batches, batch.batch_texts, batch.cache_hits,
            batch.cache_misses, {"queue": batch.rejected, "timeout": batch.timed_out}, dict(self._answered_by), drift,
            tuple(self._deployments.swaps), {one.version: one.nbytes for one in self._deployments.releases()},
            len(self.dataset.catalog), upserted, deleted,
        )  # fmt: skip

    def on_answer(self, listener: Callable[[ShownAnswer], None]) -> None:
        """Tell `listener` of every answer after it is given, shadows too, in a thread of its own; it must not raise."""
        self._afterwards.listeners.append(listener)

    def close(self, timeout: float = 10.0) -> None:
        """Refuse new requests, wait for those under way, and stop the threads."""
        self._closing.set()
        with self._idle:
            self._idle.wait_for(lambda: self._under_way == 0, timeout)
        if self._started:
            self._follower.join(timeout)
        self._afterwards.close(timeout)
        self._batcher.close()

    # How an answer is given.

    def _answer(self, route: Route, request: ServiceRequest) -> Answer:
        started = time.perf_counter()
        if request.request_id is None:
            request = request.model_copy(update={"request_id": uuid.uuid4().hex})
        with self._answering():
            key = self._state.identify(request.user) if request.user is not None else request.request_id or ""
            try:
                alias, arm, deployed, arms = self._deployments.find(request.adapter, key)
            except UnknownAdapter:
                self._compare(request.adapter)
                raise
            answer = self._answerer.answer(route, request, alias, arm, deployed)
            answer = replace(answer, took_ms=1e3 * (time.perf_counter() - started))
        self._answered_by[answer.origin.answered_by] += 1
        if answer.results:
            self._drift.add_score(answer.origin.release, answer.results[0]["score"])
        if self._afterwards.listeners:
            self._afterwards.do(lambda: self._tell(route, request, answer))
        if arms is not None and arms.shadow is not None:
            shadow = arms.shadow
            self._afterwards.do(lambda: self._answer_unseen(route, request, alias, shadow))
        return answer

    def _compare(self, name: str | None) -> None:
        """Begin to build a version of the store that somebody named and no alias means.

        Raises:
            NotReady: it is being built.
        """
        if name is None or (name != FROZEN and "@v" not in name):
            return
        self._deployments.compare(name)
        raise NotReady(f"{name} is no arm of any alias; it is being built to be compared. Ask again in a while.")

    def _answer_unseen(self, route: Route, request: ServiceRequest, alias: str, shadow: DeployedRelease) -> None:
        try:
            answer = self._answerer.answer(route, request.model_copy(update={"cursor": None}), alias, "shadow", shadow)
        except PeftComboError:
            return
        self._tell(route, request, answer)

    def _tell(self, route: Route, request: ServiceRequest, answer: Answer) -> None:
        propensities = answer.propensities or (1.0,) * len(answer.results)
        self._afterwards.tell(ShownAnswer(route, request.user, tuple(request.items), answer, propensities))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self._closing.is_set() or not self._started:
            raise NotReady("The service is closing." if self._closing.is_set() else "The service is starting.")
        with self._idle:
            self._under_way += 1
        try:
            yield
        finally:
            with self._idle:
                self._under_way -= 1
                if not self._under_way:
                    self._idle.notify_all()

    def _find_adapter(self, name: str | None) -> tuple[LiveAdapter | None, Origin]:
        """Return the adapter that a name means: an alias that is served, else what the store knows."""
        if name == FROZEN:
            fingerprint = self._bank.backbone.fingerprint
            return None, Origin(FROZEN, FROZEN, fingerprint, fingerprint[:24], "prod", "text")
        try:
            alias, arm, deployed, _ = self._deployments.find(name, "")
        except UnknownAdapter:
            try:
                live = self._bank.get(str(self._store.resolve(name or "")))
            except PeftComboError as error:
                raise UnknownAdapter(str(error)) from error
            return live, Origin(name or "", live.reference, live.digest, live.digest[:24], "prod", "text")
        release = deployed.release
        return release.adapter, Origin(alias, release.version, release.digest, release.release, arm, "text")

    # Following the state and the store.

    def _follow(self) -> None:
        before: Any = None
        folded = time.monotonic()
        while not self._closing.wait(self._config.poll_ms / 1e3):
            try:
                head = self._state.head()
                if head != before:
                    self._refresh()
                if head != before or self._deployments.behind:
                    self._deployments.follow_state()
                before = head
                self._drawer.refresh()
                if time.monotonic() - folded > _FOLD_SECONDS:
                    self.fold_events()
                    folded = time.monotonic()
                if self._config.follow == "watch":
                    self._deployments.follow_store()
            except Exception:
                _LOG.exception("the state or the store could not be followed")

    def _refresh(self) -> None:
        """Take in what is new in the state, whoever wrote it."""
        with self._items_lock:
            self._take_items()
        self._refresh_events()
        for seq, key in self._state.forgotten_since(self._forgotten_seq):
            self._forgotten_seq = max(self._forgotten_seq, seq)
            self._forget(key)

    def _refresh_events(self) -> None:
        rows = self._events.refresh()
        if rows and self._counts.add(rows):
            self._uncounted = True

    def fold_events(self) -> None:
        """Let scorers count what was bought; done every few seconds, and at once where it is asked for."""
        if self._uncounted:
            self._uncounted = False
            self._items.note_counts()
            self._deployments.refresh_items()

    def _take_items(self) -> None:
        """Take in items of the state that are new, oldest first; `_items_lock` is held."""
        changed = False
        while rows := self._state.items_since(self._items_seq, _ROWS):
            self._items.apply(rows, self._deployments.releases())
            self._items_seq = rows[-1].seq
            changed = True
        if changed:
            self._deployments.refresh_items()

    def _forget(self, key: str) -> None:
        self._forgotten = self._forgotten | {key}
        self._uncounted = self._counts.forget({key}) or self._uncounted
        self._events.forget(key)
        self._batcher.clear()  # whose query a vector was of is not known, so all go

    def _catalogue(self) -> Dataset:
        return self._deployments.find(None, "")[2].view.recommender.dataset

    def _require_item(self, item_id: str) -> None:
        if not self._items.knows(item_id):
            index = self._catalogue().catalog.index
            hint = did_you_mean(item_id, index) if len(index) <= 20_000 else ""
            raise UnknownItem(f'No item "{shorten(item_id)}". {hint}'.rstrip())
