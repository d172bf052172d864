"""Import of adapters from elsewhere: checked, tried on the encoder, and stored like one that was tuned here.

Owns what is stored of them, and what is said of what is not. Knows nothing of data or training.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from peft_combo.adapters.import_stored import import_merged, import_stored, read_stored
from peft_combo.adapters.peft_folder import PeftFolder, check_plain, try_adapter
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import shorten
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import UNKNOWN_DATA, ImportStamp, list_versions
from peft_combo.store.versions import AdapterRecord


def check_import(folder: Path) -> None:
    """Refuse a folder that holds no adapter, before the encoder is loaded.

    Raises:
        StoreError: a file is missing, too large, a link or not what it should be.
    """
    if read_stored(folder, RunCallback()) is None:
        check_plain(folder)


def import_adapter(
    folder: str | Path, category: str, backbone: Backbone, store: AdapterStore, callback: RunCallback | None = None
) -> AdapterRecord:
    """Store an adapter's folder as the next version of a category.

    Args:
        folder: a plain PEFT adapter (`adapter_config.json` and `adapter_model.safetensors`; nothing else in it is
            read), a version out of a store of this package, of any method, or its merged export.
        backbone: the encoder it was tuned on, which PEFT does not record: an encoder of the same shape takes it too.
        callback: told of what was left out.
    Returns:
        The stored version. Of a plain adapter the head is an untrained one (cosine over the encoder's vectors) and the
        metrics are empty; a version of a store keeps its head, its recipe, its data and its metrics.
    Raises:
        StoreError: a file is missing, too large, a link or not what it should be, the adapter is of a kind that is not
            known here, or it does not fit the encoder; `faults` has every fault that was found.
        BackboneError: a prefix leaves too few of the encoder's positions for text.
    """
    folder = Path(folder)
    callback = callback or RunCallback()
    match read_stored(folder, callback):
        case None:
            return _import_plain(folder, category, backbone, store, callback)
        case dict() as export:
            return import_merged(folder, export, category, backbone, store)
        case manifest:
            return import_stored(folder, manifest, category, backbone, store, callback)


def _import_plain(
    folder: Path, category: str, backbone: Backbone, store: AdapterStore, callback: RunCallback
) -> AdapterRecord:
    found = PeftFolder.read(folder, backbone)
    believed = found.believed
    if believed.left_out:
        count = len(believed.left_out)
        callback.on_note(
            f"The adapter was tuned for {found.task_type or 'a task'}: {count} tensors of its head were left out, as "
            f"{shorten(believed.left_out[0])}; what it does to the encoder is stored."
        )
    with store.writing(category) as draft:
        found.write(draft.path, backbone.base_name)
        head = BundleHead(backbone.dim, BundleTask())
        save_file(head.state_dict(), draft.path / HEAD_FILE)
        try_adapter(draft.path, folder, believed.stored_as, backbone, backbone.max_length)
        return draft.commit(
            {
                "method": believed.method,
                "stored_as": believed.stored_as,
                "task": head.spec(),
                "backbone": backbone.stamp(),
                "recipe": {},
                "data": UNKNOWN_DATA,
                "metrics": {},
                "versions": list_versions(),
                "imported": ImportStamp(
                    folder=shorten(folder.resolve().name) or "/",
                    sha256=found.sha256,
                    base_model=found.base_model,
                    peft_version=found.peft_version,
                ),
            }
        )
