"""Saving a tuned adapter: written with its head, read back, compared, and only then made visible.

Owns what the manifest of a tuned adapter says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.torch import save_file

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import set_training
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.errors import TuningError
from peft_combo.metrics.report import ResultRow, ResultTable
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import list_versions
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.setup import Setup

_RELOAD_SAMPLE = 64
# A reloaded adapter gives the same vectors but for the order of additions; a folded AdaLoRA differs by about 1e-7.
_RELOAD_TOLERANCE = 1e-4


def store_adapter(store: AdapterStore, setup: Setup, table: ResultTable, chosen: Mapping[str, Any]) -> AdapterRecord:
    """Write adapter and head, read them back, compare, and only then make the version visible.

    Raises:
        TuningError: what was read back encodes otherwise.
        StoreError: it cannot be written.
    """
    recipe, task, backbone = setup.recipe, setup.task, setup.backbone
    attached, head, gain = setup.attached, setup.head, table.gain
    with store.writing(recipe.category) as draft:
        attached.save(draft.path, backbone.base_name)
        save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, draft.path / HEAD_FILE)
        reloaded = methods.load(backbone.model, draft.path, attached.stored_as, backbone.max_length)
        sample = list(dict.fromkeys(task.texts))[:_RELOAD_SAMPLE]
        set_training(attached.inner, attached.first_layer, False)
        difference = float(np.abs(backbone.encode(sample, attached) - backbone.encode(sample, reloaded)).max())
        if not difference <= _RELOAD_TOLERANCE:
            raise TuningError(
                "The stored adapter, read back, gives other vectors than the trained one (difference "
                f"{difference:.1e}, allowed {_RELOAD_TOLERANCE:.0e}); nothing was stored. Please report it."
            )
        return draft.commit(
            {
                "method": recipe.adapter.method,
                "stored_as": attached.stored_as,
                "task": head.spec(),
                "backbone": backbone.stamp(),
                "recipe": recipe.model_dump(mode="json"),
                "data": dict(task.data),
                "metrics": {
                    "before": _figures(table.before, table),
                    "after": _figures(table.after, table),
                    "baselines": {row.name: _figures(row, table) for row in table.baselines},
                    "gain": {"value": gain.value, "low": gain.interval[0], "high": gain.interval[1], "p": gain.p},
                    "protocol": task.protocol,
                    **chosen,
                },
                "versions": list_versions(),
            }
        )


def _figures(row: ResultRow, table: ResultTable) -> dict[str, Any]:
    interval = {"value": row.values[table.metric], "low": row.interval[0], "high": row.interval[1]}
    return {**row.values, table.metric: interval}
