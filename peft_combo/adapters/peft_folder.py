"""Folder of a PEFT adapter from elsewhere: its configuration and tensors read, checked, and written anew.

Owns how the files are read: names and shapes of the tensors before the tensors, and nothing else in the folder. What of
the configuration is believed is for `peft_config` to know.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_combo.adapters.peft_config import Believed, believe
from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.methods.attached import CONFIG_FILE, WEIGHTS_FILE
from peft_combo.errors import Fault, StoreError, make_printable, shorten
from peft_combo.files import list_names, open_regular
from peft_combo.store.manifest import parse_json_object

_CONFIG_LIMIT = 2**20  # bytes; a real one has some kB
_DTYPES = {"F32", "F16", "BF16"}
_PLACES = {"I32", "I64"}  # SHiRA says which cells of a weight it trained
_PROBES = ("linen dress", "a text of a few more words than the first")


def refuse_import(folder: Path, faults: list[Fault]) -> StoreError:
    """Return the error of an adapter that cannot be imported, in at most three lines."""
    title = f"The adapter in {make_printable(str(folder))} cannot be imported:"
    return StoreError.from_faults(title, faults, limit=2 if len(faults) <= 2 else 1)


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """What a folder that PEFT's `save_pretrained` wrote holds, as it is taken over.

    Attributes:
        tensors: by their name here.
        sha256: of the weights file as it was found.
        base_model, peft_version, task_type: what the configuration says; nothing is looked up under these names.
    """

    believed: Believed
    tensors: dict[str, Tensor]
    sha256: str
    base_model: str | None
    peft_version: str | None
    task_type: str | None

    @classmethod
    def read(cls, folder: Path, backbone: Backbone) -> PeftFolder:
        """Read the files.

        Raises:
            StoreError: a file is missing, too large, a link or not what it should be, the adapter is of a kind that is
                not known here, or it does not fit the encoder.
            BackboneError: a prefix does not work on the encoder.
        """
        config = _read_config(folder)
        shapes = _read_shapes(folder)
        faults: list[Fault] = []
        believed = believe(config, shapes, backbone, faults)
        if believed is None:
            raise refuse_import(folder, faults)
        tensors, sha256 = _read_tensors(folder)
        return cls(
            believed,
            _fold({new: tensors[old] for old, new in believed.names.items()}, believed),
            sha256,
            *(_read_text(config.get(name)) for name in ("base_model_name_or_path", "peft_version", "task_type")),
        )

    def write(self, folder: Path, base_name: str) -> None:
        """Write the adapter as it is believed, naming its encoder."""
        save_file(self.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = {**self.believed.config, "inference_mode": True, "base_model_name_or_path": base_name}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def try_adapter(draft: Path, folder: Path, stored_as: str, backbone: Backbone, max_length: int) -> None:
    """Load the files of a draft and encode texts with them.

    Args:
        folder: where they came from, for messages.
    Raises:
        StoreError: they do not fit the encoder, or give vectors that are not finite.
    """
    try:
        attached = methods.load(backbone.model, draft, stored_as, max_length)
    except StoreError as error:
        raise StoreError(str(error).replace(str(draft), make_printable(str(folder)))) from error
    if not np.isfinite(backbone.encode(_PROBES, attached)).all():
        raise refuse_import(folder, [Fault(WEIGHTS_FILE, "gives vectors that are not finite on this encoder.")])


def _fold(tensors: dict[str, Tensor], believed: Believed) -> dict[str, Tensor]:
    """Fold the singular values and the scaling of an AdaLoRA into A and B; leave any other method as it is."""
    if not believed.fold:
        return tensors
    folded = {}
    for module, scale in believed.fold.items():
        right, left, values = (tensors[f"base_model.model.{module}.lora_{part}"] for part in "ABE")
        folded[f"base_model.model.{module}.lora_A.weight"] = (right * values).contiguous()
        folded[f"base_model.model.{module}.lora_B.weight"] = (left * scale).contiguous()
    return folded


def check_plain(folder: Path) -> None:
    """Refuse a folder that does not hold what PEFT writes.

    Raises:
        StoreError: a file is missing, too large, a link or not what it should be.
    """
    _read_config(folder)
    _read_shapes(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        with open_regular(folder / CONFIG_FILE) as file:
            content = file.read(_CONFIG_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise refuse_import(folder, [_explain_unreadable(folder, CONFIG_FILE, error)]) from error
    config, faults = parse_json_object(content, CONFIG_FILE, _CONFIG_LIMIT, "Save the adapter again with PEFT.")
    if config is None:
        raise refuse_import(folder, faults)
    return config


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header, which has to account for every byte of the file."""
    try:
        open_regular(folder / WEIGHTS_FILE).close()
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            types = {name: s.get_dtype() for name, s in slices.items()}
            odd = {
                name: one for name, one in types.items()
                if one not in (_PLACES if name.endswith(".shira_indices") else _DTYPES)
            }  # fmt: skip
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise refuse_import(folder, [_explain_unreadable(folder, WEIGHTS_FILE, error)]) from error
    if odd:
        name, dtype = next(iter(odd.items()))
        expected = f"expected tensors of {', '.join(sorted(_DTYPES))}, found {shorten(name)} of {dtype}."
        raise refuse_import(folder, [Fault(WEIGHTS_FILE, expected)])
    return shapes


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Read the tensors, whose shapes are known to be right by now, and the digest of their file."""
    try:
        with open_regular(folder / WEIGHTS_FILE) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise refuse_import(folder, [_explain_unreadable(folder, WEIGHTS_FILE, error)]) from error
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise refuse_import(folder, [Fault(WEIGHTS_FILE, f"holds values that are not finite, as in {broken[0]}.")])
    return tensors, sha256


def _explain_unreadable(folder: Path, name: str, error: Exception) -> Fault:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        pickled = name.replace(".safetensors", ".bin")
        if pickled != name and folder.is_dir() and pickled in list_names(folder):
            problem = f"is missing, and {pickled} is not read: it is a pickle, which runs code when it is read."
            remedy = "Where you trust it, load it with PEFT and save it with save_pretrained(), as safetensors."
            return Fault(name, problem, remedy)
        return Fault(name, "is missing.", "Give the folder that PEFT's save_pretrained() wrote.")
    if isinstance(error, OSError) and "it is a link" in str(error):
        return Fault(name, "is a link, and links are not followed.", "Copy the folder with its files: cp -rL.")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Fault(name, f"cannot be read ({shorten(reason)}).")


def _read_text(value: object) -> str | None:
    return shorten(value, 200) if isinstance(value, str) and value else None
