"""sentence-transformers over our own encoder: the peer of several benchmarks, with the same weights and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_combo.encoder.backbone import Backbone


def load_sentence_transformer(backbone: Backbone, folder: str | Path, device: str | None = "cpu") -> Any:
    """Save an encoder into a folder and load it as sentence-transformers does, with the mean over tokens.

    Args:
        device: None lets it choose.
    """
    from sentence_transformers import SentenceTransformer

    model: Any = backbone.model
    model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    peer = SentenceTransformer(str(folder), device=device)
    peer.max_seq_length = backbone.max_length
    return peer
