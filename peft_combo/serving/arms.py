"""Arms: the releases that share the traffic of an alias, and who gets which.

Owns shares and the choice of an arm, the same for a user every time. Knows nothing of how releases come to be.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from peft_combo.serving.answers import Arm
from peft_combo.serving.release import Release, ReleaseView


class ArmCounts:
    """Answers of one arm and what they took; counted without a lock, for it is the order of magnitude that matters."""

    def __init__(self) -> None:
        self.requests = 0
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one answer."""
        self.requests += 1
        self.seconds += seconds


@dataclass(frozen=True, eq=False)
class DeployedRelease:
    """An arm: a release with today's items, its share in per cent, and counts."""

    view: ReleaseView
    share: float
    counts: ArmCounts

    @property
    def release(self) -> Release:
        """The release behind the view."""
        return self.view.release


@dataclass(frozen=True, eq=False)
class Arms:
    """The arms of an alias at one moment; exchanged as a whole.

    Attributes:
        previous: versions that prod meant before, the last one last. kept: the release of the last of them, so that a
            rollback takes no building.
    """

    prod: DeployedRelease
    next: DeployedRelease | None = None
    shadow: DeployedRelease | None = None
    previous: tuple[str, ...] = ()
    kept: Release | None = None

    def list_named(self) -> dict[Arm, DeployedRelease]:
        """Return the arms there are, by name."""
        found: dict[Arm, DeployedRelease | None] = {"prod": self.prod, "next": self.next, "shadow": self.shadow}
        return {name: arm for name, arm in found.items() if arm is not None}

    def pick(self, alias: str, key: str) -> tuple[Arm, DeployedRelease]:
        """Return the arm of a user, the same every time: their hash falls into the share of one."""
        if self.next is None:
            return "prod", self.prod
        number = int.from_bytes(hashlib.sha256(f"{alias}\0{key}".encode()).digest()[:8], "big")
        return ("next", self.next) if number % 10_000 < 100 * self.next.share else ("prod", self.prod)

    def list_state(self) -> dict[str, tuple[str, float]]:
        """Return what the state keeps: per arm version and share."""
        return {name: (arm.release.version, arm.share) for name, arm in self.list_named().items()}
