"""Import of what this package stored or exported itself: a version of another store, or a merged export.

Owns how such a folder is recognised and checked, file by file, against its own manifest, and against the encoder. Its
configuration is believed no more than that of a foreign adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_combo.adapters.export_folder import MANIFEST as EXPORT_MANIFEST
from peft_combo.adapters.peft_folder import PeftFolder, refuse_import, try_adapter
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.methods import CONFIG_FILE, TUNED_WEIGHTS_FILE, WEIGHTS_FILE
from peft_combo.errors import Fault, make_printable, shorten
from peft_combo.files import open_regular
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.integrity import find_file_problem
from peft_combo.store.manifest import (
    CARD,
    MANIFEST,
    MANIFEST_LIMIT,
    UNKNOWN_DATA,
    FileEntry,
    ImportStamp,
    Manifest,
    list_versions,
    parse_json_object,
    parse_manifest,
)
from peft_combo.store.versions import AdapterRecord

_WHOLE = "model.safetensors"
_AGAIN = "Copy the folder again."


def read_stored(folder: Path, callback: RunCallback) -> Manifest | dict[str, Any] | None:
    """Return the manifest of a folder that a store or `adapters export` wrote; None where there is none.

    A manifest that does not read is noted, and the folder is left to be taken for a plain adapter.
    """
    if (content := _read_file(folder / MANIFEST)) is not None:
        manifest, faults = parse_manifest(content)
        if manifest is not None:
            return manifest
        callback.on_note(f"{MANIFEST} is not one of a stored adapter ({faults[0]}): only the adapter itself is taken.")
    if (content := _read_file(folder / EXPORT_MANIFEST)) is not None:
        export, faults = parse_json_object(content, EXPORT_MANIFEST, MANIFEST_LIMIT, _AGAIN)
        if export is None:
            raise refuse_import(folder, faults)
        return export
    return None


def _read_file(path: Path) -> bytes | None:
    try:
        with open_regular(path) as file:
            return file.read(MANIFEST_LIMIT + 1)
    except (OSError, ValueError):  # none, a link, or a path with a NUL: what needs the file says so
        return None


def import_stored(
    folder: Path, manifest: Manifest, category: str, backbone: Backbone, store: AdapterStore, callback: RunCallback
) -> AdapterRecord:
    """Store a version of another store, with its head, recipe, data, metrics, pooling and length.

    Raises:
        StoreError: a file is not as it was written, or the adapter was tuned on another encoder.
    """
    named = {name: entry for name, entry in manifest.files.items() if name != CARD}
    _check_files(folder, named)
    AdapterRecord(manifest.category, manifest.version, folder, manifest).check_backbone(
        backbone.fingerprint, backbone.name
    )
    if HEAD_FILE not in named:
        raise refuse_import(folder, [Fault(HEAD_FILE, "is missing.", _AGAIN)])
    stamp, imported = manifest.backbone, manifest.imported
    if (stamp.pooling, stamp.max_length) != (backbone.pooling, backbone.max_length):
        callback.on_note(f"It pools by {stamp.pooling} over at most {stamp.max_length} tokens, as it was tuned.")
    with store.writing(category) as draft:
        for name in named:
            if name not in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(folder / name, draft.path / name)
        if CONFIG_FILE in named:
            found = PeftFolder.read(folder, backbone)
            found.write(draft.path, backbone.base_name)
        if imported is not None:  # where it was first, before it was here
            imported = imported.model_copy(update={"folder": shorten(folder.resolve().name) or "/"})
        _check_head(manifest.task, draft.path, folder)
        try_adapter(draft.path, folder, manifest.stored_as, backbone, stamp.max_length)
        kept = ("method", "stored_as", "task", "recipe", "data", "metrics", "versions")
        return draft.commit(
            {
                **{name: getattr(manifest, name) for name in kept},
                "backbone": stamp.model_copy(update={"model": backbone.base_name}),
                "imported": imported,
            }
        )


def import_merged(
    folder: Path, export: dict[str, Any], category: str, backbone: Backbone, store: AdapterStore
) -> AdapterRecord:
    """Store a merged export as the weights in which it differs from the encoder.

    Args:
        export: content of its manifest.
    Raises:
        StoreError: it is a graph, a file is not as it was written, or it was made of another encoder.
    """
    name = make_printable(str(export.get("adapter")))
    if export.get("exported_as") != "merged":
        problem = f"is an export of {shorten(name)} as {shorten(str(export.get('exported_as')))}, a graph."
        raise refuse_import(
            folder, [Fault(EXPORT_MANIFEST, problem, "Import the stored adapter, or its merged export.")]
        )
    stamp, listed = export.get("backbone"), export.get("files")
    wanted = (_WHOLE, HEAD_FILE, "head.json")
    try:
        if not isinstance(stamp, dict) or not isinstance(listed, dict):
            raise ValueError("no backbone or no files")
        _check_files(folder, {one: FileEntry.model_validate(listed.get(one)) for one in wanted})
    except ValueError as error:
        problem = f"is not the manifest of an export ({shorten(str(error).splitlines()[0])})."
        raise refuse_import(folder, [Fault(EXPORT_MANIFEST, problem, _AGAIN)]) from error
    if stamp.get("fingerprint") != backbone.fingerprint:
        problem = f"was made of {shorten(str(stamp.get('model')))}, the loaded encoder is {shorten(backbone.name)}."
        raise refuse_import(folder, [Fault(EXPORT_MANIFEST, problem, "Name the encoder it was made of: --backbone.")])
    task, faults = parse_json_object((folder / "head.json").read_bytes(), "head.json", MANIFEST_LIMIT, _AGAIN)
    if task is None:
        raise refuse_import(folder, faults)
    frozen, merged = backbone.model.state_dict(), load_file(folder / _WHOLE)
    odd = sorted(frozen.keys() ^ merged.keys()) or [n for n in frozen if frozen[n].shape != merged[n].shape]
    if odd:
        raise refuse_import(folder, [Fault(_WHOLE, f"is not the encoder's: {shorten(odd[0])} does not fit.", _AGAIN)])
    with store.writing(category) as draft:
        changed = {n: tensor.clone() for n, tensor in merged.items() if not torch.equal(tensor, frozen[n].cpu())}
        save_file(changed, draft.path / TUNED_WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copyfile(folder / HEAD_FILE, draft.path / HEAD_FILE)
        _check_head(task, draft.path, folder)
        length = export.get("max_length")
        length = length if type(length) is int and 0 < length <= backbone.max_length else backbone.max_length
        try_adapter(draft.path, folder, "weights", backbone, length)
        return draft.commit(
            {
                "method": "full",
                "stored_as": "weights",
                "task": task,
                "backbone": {**backbone.stamp(), "pooling": str(stamp.get("pooling")), "max_length": length},
                "recipe": {},
                "data": UNKNOWN_DATA,
                "metrics": {},
                "versions": list_versions(),
                "imported": ImportStamp(
                    folder=shorten(folder.resolve().name) or "/", sha256=listed[_WHOLE]["sha256"],
                    base_model=shorten(str(stamp.get("model")), 200), peft_version=None,
                ),
            }
        )  # fmt: skip


def _check_head(task: Mapping[str, Any], draft: Path, folder: Path) -> None:
    try:
        load_head(task, load_file(draft / HEAD_FILE))
    except SafetensorError as error:
        raise refuse_import(folder, [Fault(HEAD_FILE, f"cannot be read ({shorten(str(error))}).", _AGAIN)]) from error


def _check_files(folder: Path, named: dict[str, FileEntry]) -> None:
    """Refuse files that are not as their manifest says."""
    problems = {name: find_file_problem(folder / name, entry) for name, entry in named.items()}
    faults = [Fault(name, problem, _AGAIN) for name, problem in problems.items() if problem]
    if faults:
        raise refuse_import(folder, faults)
