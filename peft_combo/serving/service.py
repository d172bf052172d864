"""Service: answers requests from the release of an alias, takes in items and events, promotes and rolls back.

Owns the order in which a request is answered and what is kept between requests. Knows nothing of HTTP, keys or tables:
routes hand it values, and the state that is to survive is handed to it. Any number of threads may use one service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from peft_combo.serving.answers import AdapterStatus, Answer, EngineFigures, ItemOutcome, Job, Origin, ShownAnswer
from peft_combo.serving.requests import ServiceRequest


class StoredItem(Protocol):
    """An item as the state keeps it: ``ItemRow`` of the state."""

    @property
    def item_id(self) -> str: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def deleted(self) -> bool: ...


class StoredEvent(Protocol):
    """What a user did: ``EventRow`` of the state; `time` in seconds since 1970."""

    @property
    def user_key(self) -> str: ...
    @property
    def item_id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def value(self) -> float | None: ...
    @property
    def time(self) -> float: ...


class ServiceState(Protocol):
    """What the service keeps over a restart; see the room `state`."""

    def identify(self, user_id: str) -> str:
        """Return the keyed hash that stands for a user everywhere."""
        ...

    def put_items(self, rows: Sequence[Any]) -> int: ...
    def items_since(self, sequence: int) -> Sequence[StoredItem]: ...
    def add_events(self, rows: Sequence[Any]) -> int: ...
    def events_of(self, user_key: str, limit: int) -> Sequence[StoredEvent]: ...
    def events_since(self, sequence: int) -> Sequence[StoredEvent]: ...
    def head(self) -> Any:
        """Return something that changes whenever anything was written; one cheap query."""
        ...

    def put_deployment(self, alias: str, arms: Mapping[str, tuple[str, float]], actor: str) -> int: ...
    def deployments(self) -> Mapping[str, Mapping[str, tuple[str, float]]]: ...
    def forget(self, user_key: str) -> Mapping[str, int]: ...
    def audit(self, actor: str, action: str, details: Mapping[str, Any]) -> None: ...


class EngineConfig(Protocol):
    """What the engine reads of `ServiceConfig`.

    Attributes:
        recipe: name or file. data: folder in place of the recipe's. store: folder of adapters; None takes the recipe's.
        adapters: aliases that are served, the first being the one that answers where a request names none; none serves
            the alias ``<category>@prod`` where it is there, else the latest version, else the frozen encoder.
        follow: who moves aliases.
        vectors, fitted: folders of item vectors and of fitted recommenders.
        batch_ms, batch_texts: how long a text waits for others, and how many go together.
        queue_texts: how many may wait. encode_timeout: seconds an encode may take, waiting included.
        text_chars: longest text. poll_ms: how often the state and the store are looked at.
        cached_queries: query vectors kept.
    """

    recipe: str
    data: Path | None
    store: Path | None
    adapters: tuple[str, ...]
    follow: Literal["watch", "told", "fixed"]
    vectors: Path
    fitted: Path
    batch_ms: float
    batch_texts: int
    queue_texts: int
    encode_timeout: float
    text_chars: int
    poll_ms: float
    cached_queries: int


class Service:
    """The engine of the service."""

    @classmethod
    def open(cls, config: EngineConfig, state: ServiceState, on_note: Callable[[str], None] = print) -> Service:
        """Load data, encoder and store, build and warm a release for every alias, and take in what the state holds.

        Args:
            on_note: told what is noticed, in sentences.
        Raises:
            PeftComboError: something that is needed is not there; nothing was started.
        """
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether every alias answered its warm-up request, and the service is not closing."""
        raise NotImplementedError

    # Answers. All raise DataError (a bad request), UnknownAdapter, CursorExpired, Overloaded, TimedOut or NotReady.

    def recommend(self, request: ServiceRequest) -> Answer:
        """Return single items for a user, items or a query, whichever are given; one result is a `Suggestion`."""
        raise NotImplementedError

    def complete(self, request: ServiceRequest) -> Answer:
        """Return single items that complete `items`."""
        raise NotImplementedError

    def compose(self, request: ServiceRequest) -> Answer:
        """Return bundles; one result is a `Recommendation` with the price of each item in `prices`."""
        raise NotImplementedError

    def replace(self, request: ServiceRequest) -> Answer:
        """Return single items that could take the place of `swap` among `items`, the rest kept."""
        raise NotImplementedError

    def search(self, request: ServiceRequest) -> Answer:
        """Return items whose texts are most like `query`."""
        raise NotImplementedError

    def rank(self, request: ServiceRequest) -> Answer:
        """Return `bundles` in the order of how well they go with items, user or query; see `compose`."""
        raise NotImplementedError

    # The encoder by itself. `adapter` is an alias, a category or a version; None the first alias that is served.

    def embed(self, texts: Sequence[str], adapter: str | None = None) -> tuple[NDArray[np.float32], Origin]:
        """Return unit vectors (B, D) of texts under an adapter."""
        raise NotImplementedError

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens texts have, special ones included."""
        raise NotImplementedError

    def tag(self, texts: Sequence[str], adapter: str | None = None) -> tuple[list[list[dict[str, Any]]], Origin]:
        """Return the entities of each text: {"text", "type", "start", "end"}; without a tagging adapter by lexicon."""
        raise NotImplementedError

    def classify(self, texts: Sequence[str], adapter: str) -> tuple[list[list[dict[str, Any]]], Origin]:
        """Return for each text {"label", "score"} of every label, likeliest first."""
        raise NotImplementedError

    def match(
        self, text: str, templates: Sequence[str], adapter: str | None = None, k: int = 5
    ) -> tuple[list[dict[str, Any]], Origin]:
        """Return the answer templates that fit a text best: {"index", "template", "score"}."""
        raise NotImplementedError

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
        raise NotImplementedError

    # Items, events, persons.

    def find_items(
        self, words: str = "", limit: int = 20, cursor: str | None = None
    ) -> tuple[list[dict[str, Any]], str | None, int]:
        """Return items whose title or id holds every word, the cursor of what comes next, and how many there are.

        One item is {"item_id", "title", "slot", "category", "price"}.
        """
        raise NotImplementedError

    def get_item(self, item_id: str) -> dict[str, Any]:
        """Return one item as `find_items` does, with all its columns under "fields".

        Raises:
            UnknownItem: there is none.
        """
        raise NotImplementedError

    def list_examples(self) -> dict[str, Any]:
        """Return {"users", "baskets", "queries"} to try, at most six of each."""
        raise NotImplementedError

    def put_items(self, items: Sequence[Mapping[str, Any]]) -> list[ItemOutcome]:
        """Take items in, new or changed, each {"item_id", "title", ...columns}; what is accepted is stored and found.

        A change names only what changes. A faulty item costs itself and no other.
        """
        raise NotImplementedError

    def delete_item(self, item_id: str) -> None:
        """Hide an item for good.

        Raises:
            UnknownItem: there is none.
        """
        raise NotImplementedError

    def add_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Store what users did and use it at once: {"user", "item_id", "kind", "value"?, "time"?}; how many were taken.

        Kinds: view, purchase, rating (`value` 1 to 5), rejected. What is of an unknown item is stored and waits for it.
        """
        raise NotImplementedError

    def forget_user(self, user: str) -> dict[str, int]:
        """Remove a person from state, caches and what scorers learned live; what was removed, by table."""
        raise NotImplementedError

    # Adapters.

    def list_adapters(self) -> list[AdapterStatus]:
        """Return every alias that is served, with its arms."""
        raise NotImplementedError

    def list_versions(self) -> list[dict[str, Any]]:
        """Return the versions in the store: version, digest, method, created, bytes, metrics, aliases, loaded."""
        raise NotImplementedError

    def load(self, alias: str, actor: str = "") -> AdapterStatus:
        """Serve one more alias."""
        raise NotImplementedError

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
            UnknownAdapter, Conflict; RefusedRelease: the version cannot be used, and nothing has changed.
        """
        raise NotImplementedError

    def rollback(self, alias: str, *, actor: str = "") -> AdapterStatus:
        """End a split or shadow; without one, let the alias mean what it meant before."""
        raise NotImplementedError

    def unload(self, alias: str, *, actor: str = "") -> None:
        """Stop serving an alias; the last one stays."""
        raise NotImplementedError

    def find_job(self, job_id: str) -> Job:
        """Return a promotion under way or done."""
        raise NotImplementedError

    # Watching.

    def measure(self) -> EngineFigures:
        """Return counts and gauges."""
        raise NotImplementedError

    def on_answer(self, listener: Callable[[ShownAnswer], None]) -> None:
        """Tell `listener` of every answer after it is given, shadows too, in a thread of its own; it must not raise."""
        raise NotImplementedError

    def close(self, timeout: float = 10.0) -> None:
        """Refuse new requests, wait for those under way, and stop the threads."""
        raise NotImplementedError
