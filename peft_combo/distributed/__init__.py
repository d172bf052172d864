"""Work in shares: one call over processes of this machine, a Ray cluster, or jobs of SLURM.

Owns workers: how they start, are handed shares, die and are replaced; the only room that imports Ray and submitit. What
travels is texts, numbers and arrays, and of a function its name alone. Knows nothing of encoders, adapters or data.
"""

from peft_combo.distributed.executor import Executor, LostShare, cut_blocks
from peft_combo.distributed.local import LocalExecutor
from peft_combo.distributed.ray_actors import RayExecutor
from peft_combo.distributed.slurm import SlurmExecutor

__all__ = ["Executor", "LocalExecutor", "LostShare", "RayExecutor", "SlurmExecutor", "cut_blocks"]
