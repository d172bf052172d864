"""Nearest-neighbour index over vectors: exact, approximate by FAISS, or either in shards kept in files.

Owns search by the largest inner product, and which index serves which size. Sees vectors and row numbers; knows nothing
of texts and items.
"""

from __future__ import annotations

from peft_combo.encoder.index.approximate import FaissIndex, FaissMissing, import_faiss
from peft_combo.encoder.index.choose import EXACT_ROWS, IndexKind, choose_kind, open_index
from peft_combo.encoder.index.exact import ExactIndex, Index, merge_results
from peft_combo.encoder.index.grown import GrownIndex
from peft_combo.encoder.index.shards import IndexManifest, ShardedIndex, build_index

__all__ = [
    "EXACT_ROWS",
    "ExactIndex",
    "FaissIndex",
    "FaissMissing",
    "GrownIndex",
    "Index",
    "IndexKind",
    "IndexManifest",
    "ShardedIndex",
    "build_index",
    "choose_kind",
    "import_faiss",
    "merge_results",
    "open_index",
]
