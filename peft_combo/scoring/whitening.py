"""Half-whitening: vectors centred, each principal component divided by the root of its deviation.

Lets small differences of meaning count beside the few directions that all texts of a shop share. Dividing by the whole
deviation (whitening; Su et al. 2021, "Whitening sentence representations") raises noise as well: halfway is better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.machine import row_blocks
from peft_combo.scoring.base import dense, unit_rows


def measure_whitening(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the centre (D,) and the map (D, D) that half-whiten: ``(vectors - centre) @ map``. From (N, D) vectors."""
    centre = vectors.mean(axis=0)
    variance, axes = np.linalg.eigh(multiply_self(vectors - centre))
    spread = np.sqrt(np.maximum(variance, 1e-12 * max(variance.max(), 1e-12)))
    # Back to the axes that the vectors came in, so that a component of little meaning keeps its place.
    return centre, np.asarray((axes / np.sqrt(spread)) @ axes.T, np.float32)


def measure_reduction(vectors: NDArray[np.float32], size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the centre (D,) and the map (D, size) that half-whiten the first `size` components alone.

    Args:
        vectors: (N, D); rows of zeros stand for what is not there, and are left out.
    Returns:
        columns of the map are 0 where the vectors have fewer components.
    """
    there = vectors[np.any(vectors != 0, axis=1)]
    if not len(there):
        return np.zeros(vectors.shape[1], np.float32), np.zeros((vectors.shape[1], size), np.float32)
    there = there / np.maximum(np.linalg.norm(there, axis=1, keepdims=True), 1e-12)
    centre = there.mean(axis=0)
    variance, axes = np.linalg.eigh(multiply_self(there - centre) / len(there))
    kept = np.flatnonzero(variance > 1e-6 * max(variance.max(), 1e-12))[::-1][:size]
    change = np.zeros((vectors.shape[1], size), np.float32)
    change[:, : len(kept)] = axes[:, kept] / variance[kept] ** 0.25
    return centre, change


def reduce_vectors(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Half-whiten vectors by themselves to `size` components: (N, D) -> (N, size), rows of length 1; zeros stay 0."""
    centre, change = measure_reduction(vectors, size)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    reduced = np.asarray((vectors / np.maximum(length, 1e-12) - centre) @ change, np.float32)
    reduced[length[:, 0] == 0] = 0
    return dense(unit_rows(reduced))


def half_whiten(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half-whiten vectors by themselves: (N, D) -> (N, D), rows of length 1."""
    centre, change = measure_whitening(vectors)
    return dense(unit_rows(np.asarray((vectors - centre) @ change, np.float32)))


def multiply_self(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return ``vectors.T @ vectors`` in double precision, without a copy of all of them: (N, D) -> (D, D)."""
    total = np.zeros((vectors.shape[1],) * 2)
    for block in row_blocks(*vectors.shape):
        part = vectors[block].astype(np.float64)
        total += part.T @ part
    return total
