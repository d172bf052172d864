"""How a base says that a text becomes one vector: the files that sentence-transformers puts beside an encoder.

Owns what of them can be followed here (mean or cls pooling) and a sentence for everything that cannot. Knows neither
weights nor tokenizers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft_combo.errors import shorten

Pooling = Literal["mean", "cls"]
ReadJson = Callable[[Path], Any]

_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
_LENGTH = "sentence_bert_config.json"
_LEGACY = "pooling_mode_"
# Mean over the square root of the length is the mean at another length, and vectors are scaled to unit length here.
_SAME: dict[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean", "cls": "cls",
                             "cls_token": "cls"}  # fmt: skip


@dataclass(frozen=True)
class SentenceConfig:
    """What the files say.

    Attributes:
        pooling: how the base pools; None where it does not say, or in a way that is not known here.
        max_length: the most tokens of a text the base was made for; None where it does not say.
        lower_case: whether texts are to be written in lower case first.
        prefix: what it puts before every text unless told otherwise; None where it does not say.
        notes: what it says and is not followed, a sentence each.
    """

    pooling: Pooling | None = None
    max_length: int | None = None
    lower_case: bool = False
    prefix: str | None = None
    notes: tuple[str, ...] = ()


def find_transformer_path(root: Path, read: ReadJson) -> Path | None:
    """Return where modules.json puts the transformer; None where it does not say."""
    return next((path for kind, _, path in _list_modules(root, read) if kind == "Transformer"), None)


def read_sentence_config(root: Path, read: ReadJson) -> SentenceConfig:
    """Read what the folder of a base says.

    Args:
        read: reads a JSON file, and raises where it cannot.
    """
    modules = _list_modules(root, read)
    pools = [path for kind, _, path in modules if kind == "Pooling"] or ([] if modules else [root / "1_Pooling"])
    pooling, notes = None, []
    for path in pools[:1]:
        if (path / "config.json").exists():
            modes = _list_modes(read(path / "config.json"))
            pooling = _SAME.get(modes[0]) if len(modes) == 1 else None
            if modes and pooling is None:
                notes.append(
                    f"The base pools by {shorten(' and '.join(modes))}, which is not known here: mean or cls only."
                )
    for kind, full, _ in modules:
        if kind not in ("Transformer", "Pooling", "Normalize") or not full.startswith("sentence_transformers."):
            notes.append(f"The base has a step that is not taken here ({_MODULES}: {shorten(full)}).")
    settings = read(root / _PROMPTS) if (root / _PROMPTS).exists() else {}
    similarity = settings.get("similarity_fn_name")
    if modules and similarity not in (None, "cosine"):
        notes.append(f"The base compares vectors by {shorten(str(similarity))}; here by the cosine, at unit length.")
    elif modules and similarity is None and "Normalize" not in [kind for kind, _, _ in modules]:
        notes.append("The base leaves vectors at their own length; here they have unit length and the cosine compares.")
    prompts = settings.get("prompts")
    told = {k: v for k, v in prompts.items() if isinstance(v, str) and v} if isinstance(prompts, dict) else {}
    name = settings.get("default_prompt_name")
    prefix = told.get(name) if isinstance(name, str) else None
    if prefix is not None and (len(prefix) > 200 or not prefix.isprintable()):
        prefix = None
    if prefix is None:
        notes += _describe_prompts(told)
    places = [root, *(path for kind, _, path in modules if kind == "Transformer")]
    limits: dict[str, Any] = next((read(path / _LENGTH) for path in places if (path / _LENGTH).exists()), {})
    longest = limits.get("max_seq_length")
    return SentenceConfig(
        pooling,
        longest if isinstance(longest, int) and longest > 0 else None,
        limits.get("do_lower_case") is True,
        prefix,
        tuple(notes),
    )


def _list_modules(root: Path, read: ReadJson) -> list[tuple[str, str, Path]]:
    """Return kind, full class name and folder of each module, in order."""
    if not (root / _MODULES).exists():
        return []
    found = []
    for module in read(root / _MODULES):
        if isinstance(module, dict) and isinstance(module.get("type"), str):
            path = module.get("path")
            inside = root / path if isinstance(path, str) and ".." not in Path(path).parts else root
            found.append((module["type"].rpartition(".")[2], module["type"], inside))
    return found


def _list_modes(config: Any) -> list[str]:
    """Return the ways a Pooling module pools, in the words of either form of its config."""
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        return [mode]
    if isinstance(mode, list):
        return [str(one) for one in mode]
    return [key.removeprefix(_LEGACY) for key, on in config.items() if key.startswith(_LEGACY) and on is True]


def _describe_prompts(told: dict[str, str]) -> list[str]:
    """Say which words the base expects before a text, and how to put them there."""
    if not told:
        return []
    first = next((k for k in ("document", "passage") if k in told), next(iter(told)))
    listed = ", ".join(f'{shorten(str(key), 20)} "{shorten(value, 40)}"' for key, value in list(told.items())[:3])
    return [
        f"The base expects words before a text ({listed}), which are not added here: "
        f"--set {shlex.quote(f'backbone.text_prefix={shorten(told[first], 60)}')} adds them."
    ]
