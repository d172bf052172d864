"""Adapter store: a model registry in a folder, with versions, aliases, rollback and integrity checks.

Owns files and names. Knows nothing of torch, of PEFT or of what the weights mean.
"""

from __future__ import annotations

from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import Manifest
from peft_combo.store.references import Reference, Version
from peft_combo.store.versions import AdapterRecord

__all__ = [
    "AdapterRecord",
    "AdapterStore",
    "Manifest",
    "Reference",
    "Version",
]
