"""LoRA files in PEFT's own format: written from matrices, and refused for unlike backbones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.methods.attached import CONFIG_FILE, WEIGHTS_FILE, AttachedAdapter
from peft_combo.store.manifest import Manifest


def write_lora(
    folder: Path, backbone: Backbone, factors: Mapping[str, tuple[Tensor, Tensor]], head: BundleHead, max_length: int
) -> AttachedAdapter:
    """Write factors and head as an adapter's files, and load them as anybody will.

    Args:
        factors: name of a linear module -> B (O, R) and A (R, I), any rank; with none at all the head stands alone.
    Raises:
        StoreError: a factor does not fit the encoder.
    """
    if factors:
        ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
        tensors = {}
        for name, (left, right) in factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
        config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "inference_mode": True, "bias": "none",
            "base_model_name_or_path": backbone.base_name, "r": max(ranks.values()), "lora_alpha": max(ranks.values()),
            "rank_pattern": ranks, "alpha_pattern": ranks,  # alpha equal to rank: a scaling of one
            "target_modules": sorted(ranks),
        }  # fmt: skip
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}, folder / HEAD_FILE)
    return methods.load(backbone.model, folder, "lora" if factors else "head", max_length)


def explain_unlike_backbones(manifests: Sequence[Manifest]) -> list[str]:
    """Say in what the encoders of some adapters differ: prefix, fingerprint, pooling, max_length; empty for none."""
    first, *others = manifests
    found = []
    for other in others:
        for name in ("text_prefix", "fingerprint", "pooling", "max_length"):
            mine, theirs = (str(getattr(m.backbone, name))[:12] for m in (first, other))
            if getattr(first.backbone, name) != getattr(other.backbone, name):
                found.append(f"{first.reference} has {name} {mine}, {other.reference} has {theirs}")
    return found
