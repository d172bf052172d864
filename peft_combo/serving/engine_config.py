"""What the engine reads of the service's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol


class EngineConfig(Protocol):
    """What the engine reads of `ServiceConfig`.

    Attributes:
        recipe: name or file. overrides: of its keys, as in training.epochs=2.
        data: folder in place of the recipe's. store: folder of adapters; None takes the recipe's.
        adapters: aliases that are served, the first being the one that answers where a request names none; none serves
            the alias ``<category>@prod`` where it is there, else the latest version, else the frozen encoder.
        follow: who moves aliases.
        vectors, fitted: folders of item vectors and of fitted recommenders.
        batch_ms, batch_texts: how long a text waits for others, and how many go together.
        queue_texts: how many may wait. encode_timeout: seconds an encode may take, waiting included.
        text_chars: longest text. poll_ms: how often the state and the store are looked at.
        encoder: form of the encoder that reads queries; see `adapters.serving_encoder`.
        cached_queries: query vectors kept.
    """

    recipe: str
    overrides: tuple[str, ...]
    data: Path | None
    store: Path | None
    adapters: tuple[str, ...]
    follow: Literal["watch", "told", "fixed"]
    vectors: Path
    fitted: Path
    batch_ms: float
    batch_texts: int
    queue_texts: int
    encode_timeout: float
    text_chars: int
    poll_ms: float
    encoder: Literal["torch", "onnx", "int8", "pruned"]
    cached_queries: int
