"""This machine: available memory, and the block sizes that large matrices are worked through in.

Knows numbers of the machine only; imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Limits:
    """Bounds on memory, the same for the whole process: lower them on a small machine.

    Attributes:
        block_cells: cells of a dense block of rows. 2^22 float32 are 16 MiB.
        block_products: multiplications in one sparse product; bounds its size to some hundred MB.
        inverted_items: the items whose items-by-items matrix is inverted, float64 and twice: 20,000 take 6.4 GB and
            minutes, 40,000 four times that.
    """

    block_cells: int = 1 << 22
    block_products: int = 20_000_000
    inverted_items: int = 20_000


LIMITS = Limits()


def row_blocks(n_rows: int, width: int) -> Iterator[slice]:
    """Cut `n_rows` rows of `width` cells into slices of at most `LIMITS.block_cells` cells, at least one row each."""
    step = max(1, LIMITS.block_cells // max(1, width))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def available_memory() -> float | None:
    """Return the MiB of memory a process could still take; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) / 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
