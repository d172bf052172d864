"""Backbone: a frozen pretrained encoder with its tokenizer and pooling; texts in, vectors out.

Owns loading (embedded, local folder or hub id; full precision, 8-bit, 4-bit), the fingerprint that ties adapters to
weights, tokenization, and encoding in length-sorted chunks. Knows nothing of tasks, nor of how
a PEFT method works.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import find_architecture
from peft_combo.encoder.base_folder import EMBEDDED, EMBEDDED_MULTILINGUAL, BaseFolder, read_base
from peft_combo.encoder.loading import (
    FewWords,
    Quantization,
    build_encoder,
    build_shapes,
    check_finite,
    check_length,
    choose_device,
    find_doubts,
    find_prefix,
    load_config,
    load_encoder,
    load_quantized,
    load_tokenizer,
    silence_loading,
)
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.sentence_config import Pooling
from peft_combo.encoder.tokens import Tokens, choose_chunk_tokens, chunk_by_length
from peft_combo.errors import BackboneError, StoreError, make_printable
from peft_combo.files import literal_path
from peft_combo.recipe.model import BackboneConfig
from peft_combo.store.versions import AdapterRecord

if TYPE_CHECKING:  # pictures are rare, and Pillow an extra
    from peft_combo.encoder.pixels import PictureEncoder

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
        max_length: texts are cut to so many tokens, special tokens and those of the prefix included.
        text_prefix: what every text begins with before it is read; "" for nothing. An empty text stays empty.
        is_cut: whether its vocabulary was cut, see `vocabulary.cut_backbone`.
        notes: what a user should know of the base and of how it is used here, a sentence each.
        pictures: the vision encoder beside it; None where the recipe names none.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, pooling: Pooling, max_length: int,
        quantization: Quantization = "none", fingerprint: str | None = None, notes: tuple[str, ...] = (),
        text_prefix: str = "",
    ) -> None:  # fmt: skip
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.quantization: Quantization = quantization
        self.notes = notes
        self.text_prefix = text_prefix
        self.is_cut = False
        self.pictures: PictureEncoder | None = None
        self._known_fingerprint = fingerprint
        self._warned_of: set[str] = set()  # quantizations of adapters that were tuned on other weights than these
        # A fast tokenizer keeps the truncation of its last call, which another thread's length would overwrite.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str = EMBEDDED,
        *,
        pooling: Pooling | None = None,
        max_length: int = 64,
        quantization: Quantization = "none",
        text_prefix: str | None = None,
        image_model: str | None = None,
        device: str | torch.device | None = None,
    ) -> Backbone:
        """Load an encoder with its tokenizer.

        Args:
            model: ``"embedded"`` (all-MiniLM-L6-v2, comes as a package), ``"embedded-multilingual"``
                (multilingual-e5-small, of the extra [multilingual]), a local folder, or a model id of the hub.
            pooling: None takes what the base says of itself, and the mean where it says nothing.
            text_prefix: what every text begins with; None takes what the base puts there by default.
            quantization: ``"8bit"`` or ``"4bit"`` (NF4) through bitsandbytes; both work on CPU too.
            image_model: a vision encoder to load beside it, ``"embedded-efficientnet"`` or a local folder.
            device: None takes the GPU where there is one, as `choose_device` says.
        Raises:
            BackboneError: not found, not reachable, no BERT-like encoder, no safetensors weights, or files that leave a
                tensor random or a token without embedding.
        """
        fields: dict[str, Any] = {
            "model": model,
            "pooling": pooling,
            "max_length": max_length,
            "quantization": quantization,
            "text_prefix": text_prefix,
            "image_model": image_model,
        }
        return cls.of(BackboneConfig.model_construct(**fields), device)

    @classmethod
    def of(cls, config: BackboneConfig, device: str | torch.device | None = None) -> Backbone:
        """Load the encoder a recipe names; see `load`."""
        device = choose_device() if device is None else device
        base = read_base(config.model)
        shapes, tokenizer, prefix = _load_parts(base)
        backbone = cls._from_shapes(config, base, shapes, tokenizer, prefix, fingerprint=None)
        backbone.model = load_encoder(base, prefix).eval().requires_grad_(False)
        check_finite(backbone.model, config.model)
        if config.quantization != "none":
            _ = backbone.fingerprint  # of the weights as published, so that 8-bit and fp32 runs can meet
            backbone.model = shapes  # the two forms are never in memory together
            backbone.model = load_quantized(base, prefix, config.quantization, device).eval().requires_grad_(False)
        else:
            backbone.model.to(device)
        if config.image_model is not None:
            from peft_combo.encoder.pixels import PictureEncoder

            backbone.pictures = PictureEncoder.load(config.image_model, device)
        return backbone

    @classmethod
    def blueprint(cls, config: BackboneConfig) -> Backbone:
        """Make the encoder a recipe names out of shapes alone (device ``meta``), with its real tokenizer.

        No weight is read, so it is there at once and takes no memory, and it cannot encode. What would stop `of` is
        found here too: the files are the same, and of the weights their names, types and shapes are read.

        Raises:
            BackboneError: as `load`.
        """
        base = read_base(config.model)
        return cls._from_shapes(config, base, *_load_parts(base))

    @classmethod
    def twin(cls, config: BackboneConfig, layers: int, device: str | torch.device = "cpu") -> Backbone:
        """Make an encoder like the one a recipe names, with random weights, few layers and few words.

        Its layers are as wide, and texts become as many tokens; so a layer takes the time and memory of a real one,
        and a method that does not work on the architecture fails here. Quantised as the recipe says.

        Raises:
            BackboneError: as `blueprint`.
        """
        base = read_base(config.model)
        small = load_config(base)
        tokenizer = load_tokenizer(base, small.vocab_size)
        small.num_hidden_layers = layers
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:layers]
        small.vocab_size = min(small.vocab_size, _TWIN_WORDS)
        small.pad_token_id = (small.pad_token_id or 0) % small.vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = build_encoder(small)
        backbone = cls._from_shapes(config, base, encoder, FewWords(tokenizer, small.vocab_size), "")
        if config.quantization != "none":
            with tempfile.TemporaryDirectory(prefix="twin-") as folder:
                with silence_loading():
                    encoder.save_pretrained(folder)  # type: ignore[operator]
                backbone.model = load_quantized(replace(base, path=Path(folder)), "", config.quantization, device)
        else:
            backbone.model.to(device)
        backbone.model.eval().requires_grad_(False)
        return backbone

    @classmethod
    def _from_shapes(
        cls, config: BackboneConfig, base: BaseFolder, encoder: nn.Module, tokenizer: Any, prefix: str,
        fingerprint: str | None = "no weights",
    ) -> Backbone:  # fmt: skip
        find_architecture(encoder)  # an encoder that is not known is refused here, not at the first adapter
        check_length(config.max_length, encoder, config.model)
        pooling, notes = _choose_pooling(config, base)
        notes += find_doubts(base, encoder, tokenizer)
        if prefix and prefix != f"{getattr(encoder, 'base_model_prefix', '')}.":
            notes.insert(
                0, f'The tensors of {base.name} start with "{prefix}", a wrapper\'s: they are read without it.'
            )
        return cls(
            config.model, encoder, tokenizer, pooling, config.max_length, config.quantization, fingerprint,
            tuple(map(make_printable, notes)),
            (base.sentence.prefix or "") if config.text_prefix is None else config.text_prefix,
        )  # fmt: skip

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
            "text_prefix": self.text_prefix,
            "image_model": None if self.pictures is None else self.pictures.name,
            "image_fingerprint": None if self.pictures is None else self.pictures.fingerprint,
        }

    def need_pictures(self) -> PictureEncoder:
        """Return the vision encoder.

        Raises:
            BackboneError: there is none.
        """
        if self.pictures is None:
            raise BackboneError(
                "There is no vision encoder beside the encoder of texts. Name one: --set "
                'backbone.image_model=embedded-efficientnet, or Backbone.load(image_model="embedded-efficientnet").'
            )
        return self.pictures

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def base_name(self) -> str:
        """The name of the weights that opens them from anywhere, as plain PEFT puts it beside an adapter.

        A hub id, or the whole path of a folder.
        """
        if self.name == EMBEDDED:
            return _EMBEDDED_HUB_ID
        if self.name == EMBEDDED_MULTILINGUAL:  # its weights went through 4 bits: they are not those of the hub
            return self.name
        folder = literal_path(self.name)
        return str(folder.resolve()) if folder.is_dir() else self.name

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
        """sha256 over the config fields that matter, vocabulary, prefix, and every weight by name, shape and bytes.

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
        if self.text_prefix:
            digest.update(f"text prefix {self.text_prefix}".encode())
        return digest.hexdigest()

    def attach(self, record: AdapterRecord) -> AttachedAdapter:
        """Put a stored adapter into a copy of the encoder that shares these weights.

        Nothing is switched on or off: pass what this returns to `encode`, as many of them and as mixed as you like.

        Raises:
            StoreError: the adapter was tuned on other weights or with another pooling, or its files do not fit.
        """
        stamp = record.manifest.backbone
        if stamp.text_prefix != self.text_prefix:
            wanted = json.dumps(stamp.text_prefix, ensure_ascii=False)
            raise StoreError(
                f"Adapter {record.reference} was tuned on texts that begin with {wanted}, this backbone puts "
                f"{json.dumps(self.text_prefix, ensure_ascii=False)} before them. Take "
                f"--set {shlex.quote(f'backbone.text_prefix={wanted}')}, or Backbone.load(text_prefix={wanted})."
            )
        record.check_backbone(self.fingerprint, self.name)
        if self.is_cut and record.manifest.stored_as == "trainable_tokens":
            raise StoreError(
                f"Adapter {record.reference} holds embeddings of tokens, by their places in the whole vocabulary. Take "
                "--set backbone.vocabulary=full."
            )
        if stamp.pooling != self.pooling:
            raise StoreError(
                f"Adapter {record.reference} was tuned with pooling {stamp.pooling}, this backbone pools by "
                f"{self.pooling}. Take --set backbone.pooling={stamp.pooling}, or "
                f'Backbone.load(pooling="{stamp.pooling}").'
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
                self._put_prefix(texts), truncation=True, max_length=max_length or self.max_length, padding=False,
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
        before = len(self.text_prefix)
        with self._tokenizing:
            found: list[list[tuple[int, int]]] = self.tokenizer(
                self._put_prefix(texts), truncation=True, max_length=max_length or self.max_length, padding=False,
                return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=True,
            )["offset_mapping"]  # fmt: skip
        if before:  # the prefix's own tokens are no part of the text
            found = [[(max(0, start - before), max(0, end - before)) for start, end in own] for own in found]
        return found

    def _put_prefix(self, texts: Sequence[str]) -> list[str]:
        return [self.text_prefix + text if text else text for text in texts] if self.text_prefix else list(texts)

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
        chunk_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Encode texts; which adapter does it is an argument, never a hidden state.

        Args:
            texts: B texts. Equal texts are encoded once.
            adapter: what `attach` returned; None for the frozen encoder.
            chunk_tokens: token positions encoded at once; None suits the device.
            progress: called with the number of texts finished since the last call.
        Returns:
            (B, D) float32, rows of unit length.
        """
        distinct = dict.fromkeys(texts)
        rows = {text: row for row, text in enumerate(distinct)}
        encoder = self.model if adapter is None else adapter.encoder
        tokens = self.tokenize(list(distinct), None if adapter is None else adapter.max_length)
        vectors = np.empty((len(distinct), self.dim), np.float32)
        for chunk in chunk_by_length(tokens.lengths, chunk_tokens or choose_chunk_tokens(self.device)):
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
        for chunk in chunk_by_length(tokens.lengths, choose_chunk_tokens(self.device)):
            ids, mask = (part.to(self.device) for part in tokens.pad(chunk, self.pad_id))
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu().numpy()
            for row, text in enumerate(chunk):
                start, stop = tokens.offsets[text], tokens.offsets[text + 1]
                states[start:stop] = hidden[row, : stop - start]
        return states


def _load_parts(base: BaseFolder) -> tuple[nn.Module, Any, str]:
    """Return the encoder's shapes, its tokenizer, and what stands before its names in the weights, all checked."""
    shapes = build_shapes(base, load_config(base))
    prefix = find_prefix(base, shapes)
    embedding: nn.Embedding = shapes.get_input_embeddings()  # type: ignore[operator]
    return shapes, load_tokenizer(base, embedding.num_embeddings), prefix


def _choose_pooling(config: BackboneConfig, base: BaseFolder) -> tuple[Pooling, list[str]]:
    """Return how texts are pooled, and what is to be said where the base has a say in it."""
    said = base.sentence
    pooling = config.pooling or said.pooling or "mean"
    notes = list(base.notes)
    if said.pooling is not None and pooling != said.pooling:
        notes.append(
            f"{base.name} says that it pools by {said.pooling}, the recipe pools by {pooling}: "
            f"--set backbone.pooling={said.pooling} follows it."
        )
    elif pooling != "mean" and config.pooling is None:
        notes.append(f"{base.name} says that it pools by {pooling}, and so it is done: backbone.pooling: {pooling}.")
    if said.max_length is not None and config.max_length > said.max_length:
        notes.append(
            f"{base.name} says that it reads {said.max_length} tokens of a text, the recipe {config.max_length}: "
            f"--set backbone.max_length={said.max_length} follows it."
        )
    return pooling, notes
