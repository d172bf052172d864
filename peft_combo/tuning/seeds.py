"""Random seeds derived from other seeds: the only source of randomness of a step."""

from __future__ import annotations

import numpy as np


def mix_seed(*numbers: int) -> int:
    """Return a 63-bit seed that any change of any number changes."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
