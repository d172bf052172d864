"""Releases of versions that are no arm: built when a request first names one, to be compared with what is in use.

Owns which few are kept, and which could not be built a moment ago. Knows nothing of aliases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from peft_combo.errors import PeftComboError
from peft_combo.serving.arms import DeployedRelease
from peft_combo.serving.errors import RefusedRelease
from peft_combo.serving.recent import Recent

_KEPT = 2
_REFUSED_S = 60.0  # so long a version that could not be built is not tried again


class ComparedReleases:
    """A few releases by version, the one named longest ago going first; safe to share between threads.

    Args:
        build: makes the release of a version. drop: frees what only this one needed. on_note: told what fails.
    """

    def __init__(
        self, build: Callable[[str], DeployedRelease], drop: Callable[[DeployedRelease], None],
        on_note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._build, self._drop, self._on_note = build, drop, on_note
        self._lock = threading.Lock()
        self._kept: Recent[str, DeployedRelease] = Recent(_KEPT)
        self._busy: set[str] = set()
        self._failed: dict[str, tuple[float, str]] = {}  # version -> when and why

    def find(self, version: str) -> DeployedRelease | None:
        """Return a release that is ready."""
        return self._kept.get(version)

    def list_all(self) -> list[DeployedRelease]:
        """Return those that are ready."""
        return [one for _, one in self._kept.list_all()]

    def start(self, version: str) -> None:
        """Build a version in the background, once.

        Raises:
            RefusedRelease: it could not be built a moment ago.
        """
        with self._lock:
            when, why = self._failed.get(version, (0.0, ""))
            if why and time.monotonic() - when < _REFUSED_S:
                raise RefusedRelease(why)
            if version in self._busy or self._kept.get(version) is not None:
                return
            self._busy.add(version)
        threading.Thread(target=self._make, args=(version,), name=f"build {version}", daemon=True).start()

    def renew(self, renew: Callable[[DeployedRelease], DeployedRelease]) -> None:
        """Exchange each for what `renew` makes of it."""
        for version, one in self._kept.list_all():
            fresh = renew(one)
            with self._lock:
                if self._kept.get(version) is one:
                    self._kept.put(version, fresh)

    def _make(self, version: str) -> None:
        try:
            made = self._build(version)
            with self._lock:
                gone = self._kept.put(version, made)
                self._failed.pop(version, None)
            for one in gone:
                self._drop(one)
        except Exception as error:
            text = str(error) if isinstance(error, PeftComboError) else f"{version}: {type(error).__name__}: {error}"
            with self._lock:
                self._failed[version] = time.monotonic(), text
            self._on_note(f"{version} cannot be compared: {text}")
        finally:
            with self._lock:
                self._busy.discard(version)
