"""Drift of what the service sees: recent query vectors and scores beside the first ones of a release.

Owns running means. The first answers of a release are the reference: a change of traffic shows, a promotion does not.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

_REFERENCE = 200  # values that the reference is made of
_RECENT = 0.01  # weight of one value in the recent mean: some hundred values back


class Drift:
    """Compares recent values with the first; safe to share between threads.

    "query_vectors": 1 less the cosine of the recent mean vector and that of the reference, 0 to 2. "scores": how many
    deviations of the reference the recent mean of the best score lies from its mean.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scores: dict[str, list[float]] = {}
        self._recent_score: dict[str, float] = {}
        self._vectors: dict[str, tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}

    def add_score(self, release: str, score: float) -> None:
        """Note the best score of an answer."""
        with self._lock:
            first = self._scores.setdefault(release, [])
            if len(first) < _REFERENCE:
                first.append(score)
                self._recent_score[release] = float(np.mean(first))
            else:
                self._recent_score[release] += _RECENT * (score - self._recent_score[release])

    def add_vectors(self, digest: str, vectors: NDArray[np.float32]) -> None:
        """Note the vectors of queries, (B, D), read with an adapter."""
        with self._lock:
            for vector in vectors.astype(np.float64):
                count, mean, recent = self._vectors.get(digest, (0, np.zeros(len(vector)), np.zeros(len(vector))))
                if count < _REFERENCE:
                    mean = mean + (vector - mean) / (count + 1)
                    recent = mean
                else:
                    recent = recent + _RECENT * (vector - recent)
                self._vectors[digest] = (count + 1, mean, recent)

    def measure(self, release: str, digest: str) -> dict[str, float]:
        """Return the drift of a release; nothing of what has no reference yet."""
        found = {}
        with self._lock:
            first = self._scores.get(release, [])
            if len(first) == _REFERENCE:
                spread = max(float(np.std(first)), 1e-9)
                found["scores"] = abs(self._recent_score[release] - float(np.mean(first))) / spread
            count, mean, recent = self._vectors.get(digest, (0, np.zeros(1), np.zeros(1)))
            length = float(np.linalg.norm(mean) * np.linalg.norm(recent))
            if count > _REFERENCE and length > 0:
                found["query_vectors"] = 1 - float(mean @ recent) / length
        return found

    def drop(self, release: str, digest: str) -> None:
        """Forget a release that nobody uses any more."""
        with self._lock:
            self._scores.pop(release, None)
            self._recent_score.pop(release, None)
            self._vectors.pop(digest, None)
