"""Manifest of a stored adapter: its schema, and its validation for writers and readers.

Owns the fields of a manifest, which of them a writer has to give, and how its bytes are read without trusting them.
Knows nothing of folders: where a manifest lies is for the store to know.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import Annotated, Any, NoReturn

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from peft_combo.errors import Fault, StoreError, did_you_mean, shorten

FORMAT = 1
"""The manifest format this code writes, and the newest it reads."""

MANIFEST = "manifest.json"
CARD = "README.md"
MANIFEST_LIMIT = 4 * 2**20  # bytes; a real manifest has a few kB, anything larger is not one
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Formats whose reading runs code that the file brings along (pickle in one coat or another).
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Text = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
JsonObject = dict[str, JsonValue]


class FileEntry(_Frozen):
    """One file of an adapter, as it was when it was written."""

    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    bytes: Count


class BackboneStamp(_Frozen):
    """The encoder an adapter was tuned on, how its outputs were pooled, and the vision encoder beside it, if any."""

    model: Text
    fingerprint: Text
    model_type: Text
    dim: Positive
    layers: Positive
    pooling: Text
    max_length: Positive
    quantization: Text = "none"
    text_prefix: Annotated[str, Field(max_length=200)] = ""
    image_model: Text | None = None
    image_fingerprint: Text | None = None


class DataStamp(BaseModel):
    """The data an adapter was tuned on; further facts (counts, split rule) may stand beside the digests."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    name: Text
    digest: Text
    split_digest: Text


UNKNOWN_DATA = DataStamp.model_validate(dict.fromkeys(("name", "digest", "split_digest"), "not known"))
"""What an imported adapter says of its data."""


class ImportStamp(_Frozen):
    """Where an adapter came from that was not tuned here; what it was tuned on is not known then.

    Attributes:
        folder: name of the folder it was read from, without its path.
        sha256: of the weights file as it was found.
        base_model, peft_version: what its `adapter_config.json` said; nothing was looked up under these names.
    """

    folder: Text
    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    base_model: Text | None
    peft_version: Text | None


class Manifest(_Frozen):
    """Everything a version says about itself. Content of `manifest.json`.

    Attributes:
        method: what the recipe asked for (`lora`, `adalora`, `prefix`, `head`, `top-layers`, `full`).
        stored_as: what the files are: a PEFT type in lower case (AdaLoRA is stored as `lora`), `bottleneck`, `head` or
            `weights`.
        metrics: `before` and `after` (metric -> number), `baselines` (name -> metric -> number), and `protocol`, which
            says how they were measured. A number may also be `{"value": v, "low": l, "high": h}`; null is not known.
        versions: package -> version at the time of tuning.
        imported: where it came from, if it was not tuned here. `recipe` is empty then, and `data` is `UNKNOWN_DATA`.
        files: name -> what it was when written; the manifest itself is not listed.
    """

    format: Positive = FORMAT
    category: Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9_-]{0,63}\z")]
    version: Annotated[int, Field(strict=True, ge=1, lt=10**9)]
    method: Text
    stored_as: Text
    task: JsonObject
    backbone: BackboneStamp
    recipe: JsonObject
    data: DataStamp
    metrics: JsonObject
    versions: dict[str, str]
    imported: ImportStamp | None = None
    created: AwareDatetime
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if problem := find_name_problem(name):
                raise ValueError(f'"{shorten(name)}" {problem}')
        return files

    @property
    def reference(self) -> str:
        return f"{self.category}@v{self.version}"


def find_name_problem(name: str) -> str:
    """Say why a name cannot be a file of an adapter; empty where it can."""
    if not _FILE.fullmatch(name):
        return "is not a file name here: letters, digits, . _ - only, not hidden, no folders."
    if name == MANIFEST:
        return "is the manifest itself and cannot be listed in it."
    if name.lower().endswith(_PICKLES):
        return "may hold a pickle, which runs code when it is read; store tensors as .safetensors."
    return ""


def parse_manifest(content: bytes) -> tuple[Manifest | None, list[Fault]]:
    """Read the bytes of a manifest: the manifest, or everything that is wrong with it."""
    remedy = "Restore it from a copy, or remove this version."
    raw, faults = parse_json_object(content, MANIFEST, MANIFEST_LIMIT, remedy)
    if raw is None:
        return None, faults
    written = raw.get("format")
    if type(written) is int and written > FORMAT:
        problem = f"has format {shorten(str(written))}, written by a newer peft-combo; this one reads up to {FORMAT}."
        return None, [Fault(MANIFEST, problem, "Upgrade with: pip install --upgrade peft-combo")]
    try:
        return Manifest.model_validate(raw), []
    except ValidationError as error:
        return None, [Fault(f"{MANIFEST}: {f.where}", f.problem, remedy) for f in list_faults(error)]


def parse_json_object(content: bytes, where: str, limit: int, remedy: str) -> tuple[dict[str, Any] | None, list[Fault]]:
    """Read bytes from elsewhere as one JSON object of at most `limit` bytes: the object, or what is wrong with it."""
    if len(content) > limit:
        return None, [Fault(where, f"is larger than {limit} bytes.", remedy)]
    try:
        raw = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else shorten(str(error))
        return None, [Fault(where, f"is not JSON ({reason}).", remedy)]
    if not isinstance(raw, dict):
        return None, [Fault(where, f"expected a JSON object, found {type(raw).__name__}.", remedy)]
    return raw, []


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def validate_manifest(values: Mapping[str, Any], category: str) -> Manifest:
    """Make the manifest a writer asked for, or say everything that is wrong with it."""
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise StoreError.from_faults(f"The adapter for {category} cannot be stored:", list_faults(error)) from error


def list_faults(error: ValidationError) -> list[Fault]:
    """Return what pydantic refused, in our form."""
    faults = []
    for detail in error.errors(include_url=False, include_context=False):
        where = ".".join(shorten(str(part)) for part in detail["loc"]) or "manifest"
        found = "" if detail["type"] in ("missing", "value_error") else f", found {shorten(repr(detail['input']))}"
        faults.append(Fault(where, shorten(detail["msg"], 200) + found + "."))
    return faults


def check_fields(fields: Mapping[str, Any], category: str, faults: list[Fault]) -> JsonObject:
    """Turn the writer's fields into plain JSON values, and collect what is missing, unknown or not plain."""
    own = {"format", "version", "created", "files"}
    wanted = [name for name in Manifest.model_fields if name not in own and name != "category"]
    said: JsonObject = {}
    for name, value in fields.items():
        if name in own:
            faults.append(Fault(name, "is for the store to say.", "Leave it out."))
        elif name == "category":
            if value != category:
                faults.append(Fault(name, f"the draft is for {category}, the fields say {shorten(repr(value))}."))
        elif name not in wanted:
            faults.append(Fault(shorten(name), "is not a field of the manifest.", did_you_mean(name, wanted)))
        else:
            said[name] = _make_plain(value, name, faults)
    required = (name for name in wanted if Manifest.model_fields[name].is_required())
    faults.extend(Fault(name, "is missing.") for name in required if name not in fields)
    return said


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that what an adapter computes depends on."""
    found = {"python": platform.python_version()}
    for package in ("peft-combo", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found


def _make_plain(value: Any, where: str, faults: list[Fault], depth: int = 0) -> JsonValue:
    if depth > 50:
        faults.append(Fault(where[:80], "is nested more than 50 deep."))
        return None
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _make_unicode(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            _make_unicode(str(key)): _make_plain(inner, f"{where}.{key}", faults, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_make_plain(inner, f"{where}.{i}", faults, depth + 1) for i, inner in enumerate(value)]
    if hasattr(value, "item"):  # scalars of numpy and torch
        with suppress(ValueError, RuntimeError, TypeError):
            return _make_plain(value.item(), where, faults, depth + 1)
    faults.append(Fault(shorten(where), f"expected a value JSON can hold, found {type(value).__name__}."))
    return None


def _make_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a lone surrogate has no place in JSON
