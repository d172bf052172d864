"""Backbone: a frozen pretrained encoder with its tokenizer and pooling; texts in, vectors out.

Owns loading (embedded, local folder or hub id; full precision, 8-bit, 4-bit), the fingerprint that ties adapters to
weights, tokenization, and encoding in length-sorted chunks. Knows nothing of tasks, nor of how
a PEFT method works.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import find_architecture
from peft_combo.encoder.loading import (
    EMBEDDED,
    Quantization,
    _check_length,
    _FewWords,
    _from_config,
    _load_config,
    _load_parts,
    _load_quantized,
    _load_tokenizer,
    _locate_weights,
    _silence_loading,
)
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.tokens import CHUNK_TOKENS, Tokens, chunk_by_length
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe.model import BackboneConfig
from peft_combo.store.versions import AdapterRecord

Pooling = Literal["mean", "cls"]
_EMBEDDED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

# Words of a twin: enough that different texts differ, few enough that the embeddings of a multilingual encoder, most of
# its weights, are never made.
_TWIN_WORDS = 2048

# Fields of a config that change what the weights compute; names, paths and versions do not.
_IRRELEVANT_CONFIG = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id",
    "gradient_checkpointing", "use_cache", "quantization_config", "_attn_implementation", "output_hidden_states",
    "output_attentions", "return_dict", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward",
}  # fmt: skip


class Backbone:
    """A frozen BERT-like encoder.

    Attributes:
        name: what it was loaded from.
        model: the encoder without pooler, in evaluation mode, nothing trainable.
        tokenizer: its tokenizer.
        pooling: mean over the real tokens, or the first token; either way scaled to unit length.
        max_length: texts are cut to so many tokens, special tokens included.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, pooling: Pooling, max_length: int,
        quantization: Quantization = "none", fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.quantization: Quantization = quantization
        self._known_fingerprint = fingerprint
        self._warned_of: set[str] = set()  # quantizations of adapters that were tuned on other weights than these
        # A fast tokenizer keeps the truncation of its last call, which another thread's length would overwrite.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str = EMBEDDED,
        *,
        pooling: Pooling = "mean",
        max_length: int = 64,
        quantization: Quantization = "none",
        device: str | torch.device | None = None,
    ) -> Backbone:
        """Load an encoder with its tokenizer.

        Args:
            model: ``"embedded"`` (all-MiniLM-L6-v2, comes as a package), a local folder, or a model id of the hub.
            quantization: ``"8bit"`` or ``"4bit"`` (NF4) through bitsandbytes; both work on CPU too.
            device: None leaves the model on the CPU (accelerate moves it when tuning).
        Raises:
            BackboneError: not found, not reachable, no safetensors weights, or no BERT-like encoder.
        """
        source = _locate_weights(model)
        tokenizer, encoder = _load_parts(source, model)
        find_architecture(encoder)  # an encoder that is not known is refused here, not at the first adapter
        _check_length(max_length, encoder, model)
        backbone = cls(model, encoder, tokenizer, pooling, max_length)
        if quantization != "none":
            fingerprint = backbone.fingerprint  # of the weights as published, so that 8-bit and fp32 runs can meet
            del encoder, backbone  # the two forms are never in memory together
            encoder = _load_quantized(source, model, quantization, device)
            backbone = cls(model, encoder, tokenizer, pooling, max_length, quantization, fingerprint)
        elif device is not None:
            backbone.model.to(device)
        return backbone

    @classmethod
    def of(cls, config: BackboneConfig, device: str | torch.device | None = None) -> Backbone:
        """Load the encoder a recipe names; see `load`."""
        return cls.load(
            config.model,
            pooling=config.pooling,
            max_length=config.max_length,
            quantization=config.quantization,
            device=device,
        )

    @classmethod
    def blueprint(cls, config: BackboneConfig) -> Backbone:
        """Make the encoder a recipe names out of shapes alone (device ``meta``), with its real tokenizer.

        No weight is read, so it is there at once and takes no memory, and it cannot encode.

        Raises:
            BackboneError: not found, not reachable, no BERT-like encoder, or `max_length` beyond its positions.
        """
        source = _locate_weights(config.model)
        tokenizer = _load_tokenizer(source, config.model)
        with torch.device("meta"):
            encoder = _from_config(_load_config(source, config.model))
        return cls._from_shapes(config, encoder, tokenizer)

    @classmethod
    def twin(cls, config: BackboneConfig, layers: int, device: str | torch.device | None = None) -> Backbone:
        """Make an encoder like the one a recipe names, with random weights, few layers and few words.

        Its layers are as wide, and texts become as many tokens; so a layer takes the time and memory of a real one,
        and a method that does not work on the architecture fails here. Quantised as the recipe says.

        Raises:
            BackboneError: as `blueprint`.
        """
        source = _locate_weights(config.model)
        tokenizer = _load_tokenizer(source, config.model)
        small = _load_config(source, config.model)
        small.num_hidden_layers = layers
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:layers]
        small.vocab_size = min(small.vocab_size, _TWIN_WORDS)
        small.pad_token_id = (small.pad_token_id or 0) % small.vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = _from_config(small)
        backbone = cls._from_shapes(config, encoder, _FewWords(tokenizer, small.vocab_size))
        if config.quantization != "none":
            with tempfile.TemporaryDirectory(prefix="twin-") as folder:
                with _silence_loading():
                    encoder.save_pretrained(folder)  # type: ignore[operator]
                backbone.model = _load_quantized(folder, config.model, config.quantization, device)
        elif device is not None:
            backbone.model.to(device)
        backbone.model.eval().requires_grad_(False)
        return backbone

    @classmethod
    def _from_shapes(cls, config: BackboneConfig, encoder: nn.Module, tokenizer: Any) -> Backbone:
        find_architecture(encoder)
        _check_length(config.max_length, encoder, config.model)
        return cls(
            config.model, encoder, tokenizer, config.pooling, config.max_length, config.quantization, "no weights"
        )

    def stamp(self) -> dict[str, Any]:
        """Return what a manifest says of the encoder an adapter was tuned on."""
        return {
            "model": self.base_name,
            "fingerprint": self.fingerprint,
            "model_type": self.model_type,
            "dim": self.dim,
            "layers": self.layers,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "quantization": self.quantization,
        }

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def base_name(self) -> str:
        """The public name of the weights, which plain PEFT puts beside an adapter."""
        return _EMBEDDED_HUB_ID if self.name == EMBEDDED else self.name

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self._config.hidden_size)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self._config.num_hidden_layers)

    @property
    def model_type(self) -> str:
        """The architecture, by its transformers name."""
        return str(self._config.model_type)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config fields that matter, the vocabulary, and every weight by name, shape and bytes.

        Two copies of the same published model agree, wherever they were loaded from; one changed weight does not.
        """
        if self._known_fingerprint is not None:
            return self._known_fingerprint
        digest = hashlib.sha256()
        config = {k: v for k, v in self._config.to_dict().items() if k not in _IRRELEVANT_CONFIG}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
        digest.update(json.dumps(vocabulary).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy()))
        return digest.hexdigest()

    def attach(self, record: AdapterRecord) -> AttachedAdapter:
        """Put a stored adapter into a copy of the encoder that shares these weights.

        Nothing is switched on or off: pass what this returns to `encode`, as many of them and as mixed as you like.

        Raises:
            StoreError: the adapter was tuned on other weights or with another pooling, or its files do not fit.
        """
        stamp = record.manifest.backbone
        record.check_backbone(self.fingerprint, self.name)
        if stamp.pooling != self.pooling:
            raise StoreError(
                f"Adapter {record.reference} was tuned with pooling {stamp.pooling}, this backbone pools by "
                f'{self.pooling}. Load it with Backbone.load(pooling="{stamp.pooling}").'
            )
        if stamp.quantization != self.quantization and stamp.quantization not in self._warned_of:
            self._warned_of.add(stamp.quantization)
            warnings.warn(
                f"Adapter {record.reference} was tuned on weights with quantization {stamp.quantization}, these have "
                f"{self.quantization}. An adapter learns to make up for the rounding of the weights it sees, so its "
                "vectors drift on others, most with 4bit (benchmarks/quantized.py measures how far). Load the backbone "
                f'with quantization="{stamp.quantization}", or tune on what will serve. Said once for each backbone.',
                stacklevel=2,
            )
        return methods.load(self.model, record.path, record.manifest.stored_as, stamp.max_length)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> Tokens:
        """Return the token ids of `texts`, each cut to `max_length` (default: the backbone's own)."""
        if not texts:
            return Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64))
        with self._tokenizing:
            encoded = self.tokenizer(
                list(texts), truncation=True, max_length=max_length or self.max_length, padding=False,
                return_attention_mask=False, return_token_type_ids=False,
            )["input_ids"]  # fmt: skip
        lengths = np.fromiter((len(ids) for ids in encoded), np.int64, len(encoded))
        flat = np.fromiter((token for ids in encoded for token in ids), np.int32, int(lengths.sum()))
        return Tokens(flat, np.concatenate([[0], np.cumsum(lengths)]))

    def pieces(self, texts: Sequence[str], max_length: int | None = None) -> list[list[tuple[int, int]]]:
        """Return for each text where its tokens (those of `tokenize`) start and end in it; (0, 0) for special ones.

        Raises:
            BackboneError: the tokenizer does not know where its tokens come from.
        """
        if not self.tokenizer.is_fast:
            raise BackboneError(
                f"The tokenizer of {self.name} does not tell where its tokens stand in a text, which tagging needs. "
                "Use a model with a tokenizer.json."
            )
        if not texts:
            return []
        with self._tokenizing:
            found: list[list[tuple[int, int]]] = self.tokenizer(
                list(texts), truncation=True, max_length=max_length or self.max_length, padding=False,
                return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=True,
            )["offset_mapping"]  # fmt: skip
        return found

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool hidden states of a chunk.

        Args:
            hidden: (B, L, D). mask: (B, L), 1 for real tokens.
        Returns:
            (B, D) float32 of unit length.
        """
        hidden = hidden.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden.dtype)
            # (B, 1, L) @ (B, L, D): one product instead of a masked copy of the hidden states
            pooled = torch.bmm(weights[:, None], hidden)[:, 0] / weights.sum(1, keepdim=True).clamp_min(1.0)
        return nn.functional.normalize(pooled, dim=-1)

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        adapter: AttachedAdapter | None = None,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Encode texts; which adapter does it is an argument, never a hidden state.

        Args:
            texts: B texts. Equal texts are encoded once.
            adapter: what `attach` returned; None for the frozen encoder.
            progress: called with the number of texts finished since the last call.
        Returns:
            (B, D) float32, rows of unit length.
        """
        distinct = dict.fromkeys(texts)
        rows = {text: row for row, text in enumerate(distinct)}
        encoder = self.model if adapter is None else adapter.encoder
        tokens = self.tokenize(list(distinct), None if adapter is None else adapter.max_length)
        vectors = np.empty((len(distinct), self.dim), np.float32)
        for chunk in chunk_by_length(tokens.lengths, chunk_tokens):
            ids, mask = (part.to(self.device) for part in tokens.pad(chunk, self.pad_id))
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            vectors[chunk] = self.pool(hidden, mask).cpu().numpy()
            if progress is not None:
                progress(len(chunk))
        return vectors[[rows[text] for text in texts]]

    @torch.inference_mode()
    def states(self, texts: Sequence[str], adapter: AttachedAdapter | None = None) -> NDArray[np.float32]:
        """Return the last hidden state of every token of every text, special ones included: (T, D) float32.

        Those of the first text come first, without padding; `pieces` says which token is which.
        """
        encoder = self.model if adapter is None else adapter.encoder
        tokens = self.tokenize(texts, None if adapter is None else adapter.max_length)
        states = np.empty((len(tokens.ids), self.dim), np.float32)
        for chunk in chunk_by_length(tokens.lengths):
            ids, mask = (part.to(self.device) for part in tokens.pad(chunk, self.pad_id))
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu().numpy()
            for row, text in enumerate(chunk):
                start, stop = tokens.offsets[text], tokens.offsets[text + 1]
                states[start:stop] = hidden[row, : stop - start]
        return states
