"""Import of PEFT adapters from elsewhere: checked, tried on the encoder, and stored like one that was tuned here.

Owns what of a foreign adapter is believed. Its tensors are read for their names and shapes before they are read, and
its configuration is written anew from what is known here: a configuration may name modules to import, repositories to
load and regular expressions to run, and nothing of that is followed. Knows nothing of data or training.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import find_architecture
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.methods.attached import CONFIG_FILE, WEIGHTS_FILE
from peft_combo.errors import BackboneError, Fault, StoreError, did_you_mean, make_printable, shorten
from peft_combo.files import list_names, open_regular
from peft_combo.recipe.adapter import LoraAdapter, PrefixAdapter
from peft_combo.recipe.fields import format_value
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import UNKNOWN_DATA, ImportStamp, list_versions, parse_json_object
from peft_combo.store.versions import AdapterRecord

_CONFIG_LIMIT = 2**20  # bytes; a real one has some kB
_DTYPES = {"F32", "F16", "BF16"}
_PROBES = ("linen dress", "a text of a few more words than the first")
_LORA_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_PREFIX_TENSOR = "prompt_embeddings"
_LITERAL = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

# What says nothing about the vectors of a finished adapter: how it was trained, who wrote it, and for LoRA where it
# sits, which the names of its tensors say better.
_NO_MATTER = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config",
}  # fmt: skip
_NO_MATTER_LORA = _NO_MATTER | {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
_READ_LORA = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights",
}  # fmt: skip
_NO_MATTER_PREFIX = _NO_MATTER | {
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size",
    "prefix_projection", "init_weights",
}  # fmt: skip
# Ways to start a LoRA that leave the frozen weights as they are; the others count on weights that were changed.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


def check_import(folder: Path) -> None:
    """Refuse a folder that does not hold what PEFT writes, before the encoder is loaded.

    Raises:
        StoreError: a file is missing, too large, a link or not what it should be.
    """
    _read_config(folder)
    _read_shapes(folder)


def import_adapter(folder: str | Path, category: str, backbone: Backbone, store: AdapterStore) -> AdapterRecord:
    """Store a plain PEFT adapter folder as the next version of a category.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; nothing else in it is read.
        backbone: the encoder it was tuned on, which PEFT does not record: an encoder of the same shape takes it too.
    Returns:
        The stored version: its head is an untrained one (cosine over the encoder's vectors), its metrics are empty.
    Raises:
        StoreError: a file is missing, too large, a link or not what it should be, the adapter is of a kind that is not
            known here, or it does not fit the encoder; every fault that was found is told.
        BackboneError: a prefix leaves too few of the encoder's positions for text.
    """
    folder = Path(folder)
    config = _read_config(folder)
    shapes = _read_shapes(folder)
    faults: list[Fault] = []
    match config.get("peft_type"):
        case "LORA":
            method, stored_as = "dora" if config.get("use_dora") is True else "lora", "lora"
            known = _rewrite_lora(config, shapes, backbone, faults)
        case "PREFIX_TUNING":
            method, stored_as = "prefix", "prefix_tuning"
            known = _rewrite_prefix(config, shapes, backbone, faults)
        case other:
            found = "nothing" if other is None else format_value(other)
            hint = did_you_mean(other, ("LORA", "PREFIX_TUNING")) if isinstance(other, str) else ""
            faults.append(Fault("peft_type", f"expected LORA or PREFIX_TUNING, found {found}.", hint))
    if faults:
        raise _refuse(folder, faults)
    tensors, sha256 = _read_tensors(folder)

    with store.writing(category) as draft:
        save_file(tensors, draft.path / WEIGHTS_FILE, metadata={"format": "pt"})
        known |= {"inference_mode": True, "base_model_name_or_path": backbone.base_name}
        (draft.path / CONFIG_FILE).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        head = BundleHead(backbone.dim, BundleTask())
        save_file(head.state_dict(), draft.path / HEAD_FILE)
        try:
            attached = methods.load(backbone.model, draft.path, stored_as, backbone.max_length)
        except StoreError as error:
            raise StoreError(str(error).replace(str(draft.path), make_printable(str(folder)))) from error
        vectors = backbone.encode(_PROBES, attached)
        if not np.isfinite(vectors).all():
            raise _refuse(folder, [Fault(WEIGHTS_FILE, "gives vectors that are not finite on this encoder.")])
        return draft.commit(
            {
                "method": method,
                "stored_as": stored_as,
                "task": head.spec(),
                "backbone": backbone.stamp(),
                "recipe": {},
                "data": UNKNOWN_DATA,
                "metrics": {},
                "versions": list_versions(),
                "imported": ImportStamp(
                    folder=shorten(folder.resolve().name) or "/",
                    sha256=sha256,
                    base_model=_read_text(config.get("base_model_name_or_path")),
                    peft_version=_read_text(config.get("peft_version")),
                ),
            }
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        with open_regular(folder / CONFIG_FILE) as file:
            content = file.read(_CONFIG_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise _refuse(folder, [_explain_unreadable(folder, CONFIG_FILE, error)]) from error
    config, faults = parse_json_object(content, CONFIG_FILE, _CONFIG_LIMIT, "Save the adapter again with PEFT.")
    if config is None:
        raise _refuse(folder, faults)
    return config


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header, which has to account for every byte of the file."""
    try:
        open_regular(folder / WEIGHTS_FILE).close()
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            odd = {name: s.get_dtype() for name, s in slices.items() if s.get_dtype() not in _DTYPES}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _refuse(folder, [_explain_unreadable(folder, WEIGHTS_FILE, error)]) from error
    if odd:
        name, dtype = next(iter(odd.items()))
        expected = f"expected tensors of {', '.join(sorted(_DTYPES))}, found {shorten(name)} of {dtype}."
        raise _refuse(folder, [Fault(WEIGHTS_FILE, expected)])
    return shapes


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Read the tensors, whose shapes are known to be right by now, and the digest of their file."""
    try:
        with open_regular(folder / WEIGHTS_FILE) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _refuse(folder, [_explain_unreadable(folder, WEIGHTS_FILE, error)]) from error
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise _refuse(folder, [Fault(WEIGHTS_FILE, f"holds values that are not finite, as in {broken[0]}.")])
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


# --- what is believed -------------------------------------------------------------------------------------------------


def _rewrite_lora(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], backbone: Backbone, faults: list[Fault]
) -> dict[str, Any]:
    """Return the configuration of a LoRA adapter in our words; where it sits and its ranks come from its tensors."""
    _refuse_unknown(config, _NO_MATTER_LORA | _READ_LORA, faults)
    rank = _read_number(config, "r", LoraAdapter, "rank", faults)
    alpha = _read_number(config, "lora_alpha", LoraAdapter, "alpha", faults)
    ranks, alphas = _read_pattern(config, "rank_pattern", faults), _read_pattern(config, "alpha_pattern", faults)
    faults += [
        Fault(name, f"expected true or false, found {format_value(config[name])}.")
        for name in ("use_rslora", "use_dora")
        if not isinstance(config.get(name, False), bool)
    ]
    if config.get("bias", "none") != "none":
        faults.append(Fault("bias", "expected none: biases that were trained too are not an adapter's."))
    start = config.get("init_lora_weights")
    if start is not None and not isinstance(start, bool) and start not in _PLAIN_STARTS:
        problem = f"{format_value(start)} changes the frozen weights too, and these files do not hold them."
        remedy = "Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        faults.append(Fault("init_lora_weights", problem, remedy))
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _LORA_TENSOR.fullmatch(name)
        if match is None:
            faults.append(Fault(shorten(name), "is not a tensor of LoRA on a linear layer."))
            continue
        module, part = match[1], match[2]
        width = _read_linear_size(backbone, module)
        if width is None:
            faults.append(Fault(shorten(name), f"{backbone.name} has no linear layer {shorten(module)}."))
            continue
        inputs, outputs = width
        wanted = _look_up_value(ranks, module, rank)
        expected = {"lora_A": (wanted, inputs), "lora_B": (outputs, wanted), "lora_magnitude_vector": (outputs,)}[part]
        if shape != expected:
            faults.append(Fault(shorten(name), f"expected the shape {expected}, found {shape}."))
        modules[module] = int(wanted)
    if not modules and not faults:
        faults.append(Fault(WEIGHTS_FILE, "holds no tensors."))
    return {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "bias": "none", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules), "rank_pattern": modules,
        "alpha_pattern": {module: _look_up_value(alphas, module, alpha) for module in modules},
        "use_rslora": config.get("use_rslora") is True, "use_dora": config.get("use_dora") is True,
    }  # fmt: skip


def _rewrite_prefix(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], backbone: Backbone, faults: list[Fault]
) -> dict[str, Any]:
    """Return the configuration of a prefix in our words; its shape is the encoder's."""
    _refuse_unknown(config, _NO_MATTER_PREFIX | {"num_virtual_tokens"}, faults)
    length = _read_number(config, "num_virtual_tokens", PrefixAdapter, "length", faults)
    if not find_architecture(backbone.model).prefix:
        raise BackboneError(f"A prefix does not work on {backbone.model_type}: its attention takes no outside keys.")
    sizes: Any = backbone.model.config
    expected = {_PREFIX_TENSOR: (length, 2 * backbone.layers * backbone.dim)}
    if dict(shapes) != expected:
        found = ", ".join(f"{shorten(name)} {shape}" for name, shape in list(shapes.items())[:3]) or "no tensors"
        problem = f"expected {_PREFIX_TENSOR} {expected[_PREFIX_TENSOR]} for {backbone.name}, found {found}."
        faults.append(Fault(WEIGHTS_FILE, problem))
    return {
        "peft_type": "PREFIX_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": length,
        "token_dim": backbone.dim, "num_layers": backbone.layers, "num_transformer_submodules": 1,
        "num_attention_heads": int(sizes.num_attention_heads), "prefix_projection": False,
    }  # fmt: skip


def _refuse_unknown(config: Mapping[str, Any], known: set[str], faults: list[Fault]) -> None:
    """A field that is not known here must not say anything, for it may change what the adapter computes."""
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            faults.append(Fault(shorten(name), f"is not known here, and says {format_value(value)}."))


def _read_number(config: Mapping[str, Any], name: str, section: Any, field: str, faults: list[Fault]) -> int | float:
    """Return a number that a recipe could have asked for as well."""
    value = config.get(name)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        return getattr(section(**{field: value}), field)  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        bounds = section.model_json_schema()["properties"][field]
        low = bounds.get("minimum", bounds.get("exclusiveMinimum"))
        faults.append(Fault(name, f"expected a number from {low} to {bounds['maximum']}, found {format_value(value)}."))
        return 1


def _read_pattern(config: Mapping[str, Any], name: str, faults: list[Fault]) -> dict[str, int | float]:
    """Return the numbers of single modules, by the end of their names; PEFT would take these for expressions."""
    values = config.get(name) or {}
    if not isinstance(values, dict):
        faults.append(Fault(name, f"expected numbers by module, found {format_value(values)}."))
        return {}
    found = {}
    for key, value in values.items():
        where = f"{name}.{shorten(key)}"
        if not _LITERAL.fullmatch(key):
            faults.append(Fault(where, "expected the name of a module; expressions are not run."))
            continue
        field = "rank" if name == "rank_pattern" else "alpha"
        found[key] = _read_number({where: value}, where, LoraAdapter, field, faults)
    return found


def _look_up_value(values: Mapping[str, int | float], module: str, default: int | float) -> int | float:
    return next((value for key, value in values.items() if f".{module}".endswith(f".{key}")), default)


def _read_linear_size(backbone: Backbone, module: str) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear layer of the encoder, None where there is none of that name."""
    try:
        found = backbone.model.get_submodule(module)
    except AttributeError:
        return None
    inputs, outputs = getattr(found, "in_features", None), getattr(found, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _read_text(value: object) -> str | None:
    return shorten(value, 200) if isinstance(value, str) and value else None


def _refuse(folder: Path, faults: list[Fault]) -> StoreError:
    return StoreError.from_faults(f"The adapter in {make_printable(str(folder))} cannot be imported:", faults)
