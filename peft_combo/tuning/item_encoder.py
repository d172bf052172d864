"""Item encoder with a cache of the frozen layers: the catalogue encoded again and again while an adapter learns.

Owns which text belongs to which item, the cache of the frozen layers' outputs, the chunks, and the division of work
over processes. The result is that of encoding text by text (equal within float tolerance); only the time differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder.architectures import lower_view, upper_view
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.tokens import Tokens, choose_chunk_tokens, chunk_by_length
from peft_combo.tuning.gather import _concatenate_ranges, gather_shares


@dataclass(frozen=True, eq=False)
class Selection:
    """What is run to encode some items.

    Attributes:
        texts: (K,) numbers of the texts to run.
        place: (M,) for each item, which of `texts` it is.
        tokens: (T,) ids to run in place of the texts' own, one text behind the other; None runs their own.
        added: (S, D) what is added to the states of this process's share of the texts where they enter the layers that
            learn, without padding; None adds nothing.
    """

    texts: NDArray[np.int64]
    place: NDArray[np.int64]
    tokens: NDArray[np.int64] | None = None
    added: Tensor | None = None


class ItemEncoder:
    """Encodes items of one catalogue with whatever adapter state an encoder is in.

    Three things make it fast, none of which changes the result: equal texts are encoded once; texts of like length
    share a chunk, so next to nothing is padding; and where an adapter sits in the top layers only, the layers below
    are run once for all steps and their outputs kept, in memory or beyond the limit on disk.

    Attributes:
        encoder: the module that learns; pass it (or a wrapped form) to `encode`.
        frozen: the same part of the encoder without the adapter.
        per_token: whether an item becomes the states of its tokens instead of one vector.
        number_of: text -> its number; those of the items come first.
        text_of: (N,) for each item the number of its text; items with equal texts share one.
        cached_bytes: size of the cache; 0 where there is none.
    """

    def __init__(
        self,
        backbone: Backbone,
        attached: AttachedAdapter,
        texts: Sequence[str],
        *,
        per_token: bool = False,
        retokenized: bool = False,
        extra_texts: Sequence[str] = (),
        fast: bool = True,
        cache_limit_bytes: int = 2**30,
        scratch: Path | None = None,
        process: int = 0,
        processes: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Tokenise the texts, and run the frozen layers once where that serves.

        Args:
            retokenized: tokens of the texts will be exchanged (`encode`), so what the frozen layers say of the texts
                as they are is of no use.
            extra_texts: further texts that a `Selection` may name, though they are no item's.
        """
        distinct = dict.fromkeys(texts)
        number = {text: place for place, text in enumerate(distinct)}
        self.text_of = np.array([number[text] for text in texts], np.int64)
        for text in extra_texts:
            number.setdefault(text, len(number))
        self.number_of = number
        self.tokens: Tokens = backbone.tokenize(list(number), attached.max_length)
        self.per_token = per_token
        # Rows that each text has in what `encode` returns.
        self._sizes = self.tokens.lengths if per_token else np.ones(len(self.tokens), np.int64)
        self.process, self.processes = process, processes
        self._backbone = backbone
        self._inner = attached.inner
        self._fast = fast
        self._cache: Tensor | None = None
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        self.cached_bytes = 0
        if fast and attached.first_layer > 0 and cache_limit_bytes > 0 and not retokenized:
            self.encoder: nn.Module = upper_view(attached.inner, attached.first_layer)
            self.frozen: nn.Module = upper_view(backbone.model, attached.first_layer)
            self._fill_cache(lower_view(backbone.model, attached.first_layer), cache_limit_bytes, scratch, progress)
        else:
            self.encoder = attached.encoder
            self.frozen = backbone.model

    def __len__(self) -> int:
        """Number of distinct texts, extra ones included."""
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Number of vectors or states that the whole catalogue becomes."""
        return int(self._sizes[self.text_of].sum())

    def encode(self, encoder: nn.Module, items: NDArray[np.int64]) -> Tensor:
        """Encode items, with gradients where the caller has them on.

        Args:
            encoder: `self.encoder`, `self.frozen`, or a wrapped form of either.
            items: (M,) rows of the catalogue.
        Returns:
            (M, D) float32 of unit length; or where this encoder is `per_token` (T, D) float32, the states of every
            token of the first item, then of the second, without padding.
        """
        return self.encode_selection(encoder, self.select(items))

    def select(self, items: NDArray[np.int64], tokens: NDArray[np.int64] | None = None) -> Selection:
        """Return what is run for (M,) items: their distinct texts, as they are.

        Args:
            tokens: ids to run in place of the items' own, one text behind the other; only for an encoder that is
                `retokenized`, and items whose texts are distinct and ascending.
        """
        texts, place = np.unique(self.text_of[items], return_inverse=True)
        return Selection(texts, place, tokens)

    def encode_selection(self, encoder: nn.Module, selection: Selection) -> Tensor:
        """Encode what was selected; see `encode`.

        With several processes each encodes a share and all get the whole; gradients flow as if one had done it all.
        """
        texts, place = selection.texts, selection.place
        share = len(texts[self.process :: self.processes])
        own, tokens = self._share_of(selection)
        encoded = self._encode(encoder, own, tokens, selection.added)
        encoded = encoded[: int(self._sizes[own[:share]].sum())]
        sizes = self._sizes[texts]
        whole = gather_shares(encoded, sizes, self.process, self.processes)
        rows = _concatenate_ranges((np.cumsum(sizes) - sizes)[place], sizes[place])
        return whole[torch.from_numpy(rows).to(whole.device)]

    @torch.no_grad()
    def entering_states(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return what enters the layers that learn, for this process's share of what was selected.

        Returns:
            (S, D) states of tokens, without padding, and (S,) which text of the share each is of, from 0.
        """
        own, tokens = self._share_of(selection)
        padded, mask = self._entering(own, tokens)
        states: Tensor = padded[mask.bool()]
        text = torch.from_numpy(np.repeat(np.arange(len(own)), self.tokens.lengths[own]))
        return states, text.to(states.device)

    def _share_of(self, selection: Selection) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Return the texts that this process runs, and the ids in place of their own."""
        texts, tokens = selection.texts, selection.tokens
        own = texts[self.process :: self.processes]
        # With more processes than texts an idle one must still touch every weight: the others wait for its gradients.
        own = own if len(own) else texts[:1]
        if tokens is None:
            return own, None
        spans = np.split(tokens, np.cumsum(self.tokens.lengths[texts])[:-1])
        return own, np.concatenate(spans[self.process :: self.processes] or spans[:1])

    @torch.inference_mode()
    def catalogue(
        self, encoder: nn.Module, items: NDArray[np.int64] | None = None, *, tokens: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Encode `items`, or all of them, without gradients; see `encode` and `select`."""
        selection = self.select(np.arange(len(self.text_of)) if items is None else items, tokens)
        encoded: NDArray[np.float32] = self.encode_selection(encoder, selection).cpu().numpy()
        return encoded

    def _encode(
        self, encoder: nn.Module, texts: NDArray[np.int64], tokens: NDArray[np.int64] | None, added: Tensor | None
    ) -> Tensor:
        """Encode texts by number, (K,) -> (K, D), or the states of all their tokens."""
        lengths = self.tokens.lengths[texts]
        chunks = [np.arange(len(texts))]
        if self._fast:
            chunks = list(chunk_by_length(lengths, choose_chunk_tokens(self._backbone.device)))
        encoded = []
        begin = np.cumsum(lengths) - lengths  # where each text's tokens begin among those of `texts`
        for chunk in chunks:
            rows = texts[chunk]
            shown = None if tokens is None else tokens[_concatenate_ranges(begin[chunk], lengths[chunk])]
            if self._cache is None and added is None:
                ids, mask = self._ids(rows, shown)
                hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                states, mask = self._entering(rows, shown)
                if added is not None:
                    own = torch.from_numpy(_concatenate_ranges(begin[chunk], lengths[chunk])).to(states.device)
                    states = states.masked_scatter(mask.bool()[..., None], states[mask.bool()] + added[own])
                hidden = encoder(inputs_embeds=states, attention_mask=mask).last_hidden_state
            encoded.append(hidden[mask.bool()].float() if self.per_token else self._backbone.pool(hidden, mask))
        if not encoded:
            return torch.empty(0, self._backbone.dim, device=self._backbone.device)
        order, sizes = np.concatenate(chunks), self._sizes[texts]
        starts = np.empty(len(order), np.int64)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        return torch.cat(encoded)[torch.from_numpy(_concatenate_ranges(starts, sizes)).to(encoded[0].device)]

    def _ids(self, rows: NDArray[np.int64], tokens: NDArray[np.int64] | None) -> tuple[Tensor, Tensor]:
        """Return ids and mask of texts, both (B, L); `tokens` in place of their own where there are some."""
        ids, mask = (part.to(self._backbone.device) for part in self.tokens.pad(rows, self._backbone.pad_id))
        if tokens is not None:
            ids[mask.bool()] = torch.from_numpy(tokens).to(ids)
        return ids, mask

    def _entering(self, rows: NDArray[np.int64], tokens: NDArray[np.int64] | None) -> tuple[Tensor, Tensor]:
        """Return the states (B, L, D) that enter the first layer in training, and their mask (B, L).

        Without a cache that is the first of all layers, and the states are the embeddings of the tokens.
        """
        if self._cache is None:
            ids, mask = self._ids(rows, tokens)
            return self._inner.get_input_embeddings()(ids), mask  # type: ignore[operator]
        lengths = self.tokens.lengths[rows]
        position = np.arange(int(lengths.max()))
        present = position < lengths[:, None]
        # What stands in padded places is some other text's state: never attended to, never pooled.
        source = np.minimum(self.tokens.offsets[rows][:, None] + position, len(self._cache) - 1)
        device = self._backbone.device
        states = self._cache[torch.from_numpy(source).to(self._cache.device)]
        return states.to(device), torch.from_numpy(present.astype(np.int64)).to(device)

    @torch.no_grad()
    def _fill_cache(
        self, lower: nn.Module, limit: int, scratch: Path | None, progress: Callable[[int], None] | None
    ) -> None:
        shape = (len(self.tokens.ids), self._backbone.dim)
        self.cached_bytes = 4 * shape[0] * shape[1]
        if self.cached_bytes <= limit:
            cache = torch.empty(shape, device=self._backbone.device)
        else:
            self._spill = tempfile.TemporaryDirectory(prefix="layer-cache-", dir=scratch)
            file = Path(self._spill.name) / "states.f32"
            cache = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
        device = self._backbone.device
        for chunk in chunk_by_length(self.tokens.lengths, choose_chunk_tokens(device)):
            ids, mask = (part.to(device) for part in self.tokens.pad(chunk, self._backbone.pad_id))
            states = lower(input_ids=ids, attention_mask=mask).last_hidden_state.float().to(cache.device)
            source = self.tokens.offsets[chunk][:, None] + np.arange(ids.shape[1])
            real = mask.bool().to(cache.device)
            cache[torch.from_numpy(source).to(cache.device)[real]] = states[real]
            if progress is not None:
                progress(len(chunk))
        self._cache = cache

    def close(self) -> None:
        """Give back the cache, and the file behind it where there is one."""
        self._cache = None
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None
