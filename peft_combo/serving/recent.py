"""A bounded map that lets go of what nobody asked for longest; knows nothing of what it keeps."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Recent(Generic[KeyT, ValueT]):
    """Values by key, at most `most` of them; safe to share between threads.

    Source: the cache of `functools.lru_cache`, which can neither forget one key nor say what it let go of.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._kept: OrderedDict[KeyT, ValueT] = OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        """Return what is kept, and count it as asked for now."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: KeyT, value: ValueT) -> list[ValueT]:
        """Keep a value; return those that had to go."""
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            return [self._kept.popitem(last=False)[1] for _ in range(len(self._kept) - self._most)]

    def get_or_make(self, key: KeyT, make: Callable[[], ValueT]) -> ValueT:
        """Return what is kept, or make it, once however many ask."""
        with self._lock:
            if key not in self._kept:
                made = make()
                self.put(key, made)
                return made
            self._kept.move_to_end(key)
            return self._kept[key]

    def list_all(self) -> list[tuple[KeyT, ValueT]]:
        """Return all that is kept."""
        with self._lock:
            return list(self._kept.items())

    def forget(self, keys: Iterable[KeyT]) -> None:
        """Forget keys, those that are there."""
        with self._lock:
            for key in keys:
                self._kept.pop(key, None)
