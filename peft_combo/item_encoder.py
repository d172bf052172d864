"""The catalogue's texts, encoded again and again while an adapter learns: the fast path of tuning.

Owns which text belongs to which item, the cache of the frozen layers' outputs, the chunks, and the division of work
over processes. The result is that of encoding text by text (equal within float tolerance); only the time differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.architectures import lower_view, upper_view
from peft_combo.backbone import CHUNK_TOKENS, Backbone, Tokens, length_sorted_chunks
from peft_combo.methods import AttachedAdapter


class ItemEncoder:
    """Encodes items of one catalogue with whatever adapter state an encoder is in.

    Three things make it fast, none of which changes the result: equal texts are encoded once; texts of like length
    share a chunk, so next to nothing is padding; and where an adapter sits in the top layers only, the layers below
    are run once for all steps and their outputs kept, in memory or beyond the limit on disk.

    Attributes:
        encoder: the module that learns; pass it (or a wrapped form) to `encode`.
        frozen: the same part of the encoder without the adapter.
        per_token: whether an item becomes the states of its tokens instead of one vector.
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
        fast: bool = True,
        cache_limit_bytes: int = 2**30,
        scratch: Path | None = None,
        process: int = 0,
        processes: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        distinct = dict.fromkeys(texts)
        number = {text: place for place, text in enumerate(distinct)}
        self.text_of = np.array([number[text] for text in texts], np.int64)
        self.tokens: Tokens = backbone.tokenize(list(distinct), attached.max_length)
        self.per_token = per_token
        # Rows that each text has in what `encode` returns.
        self._sizes = self.tokens.lengths if per_token else np.ones(len(self.tokens), np.int64)
        self.process, self.processes = process, processes
        self._backbone = backbone
        self._fast = fast
        self._cache: Tensor | None = None
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        self.cached_bytes = 0
        if fast and attached.cut > 0 and cache_limit_bytes > 0:
            self.encoder: nn.Module = upper_view(attached.inner, attached.cut)
            self.frozen: nn.Module = upper_view(backbone.model, attached.cut)
            self._fill_cache(lower_view(backbone.model, attached.cut), cache_limit_bytes, scratch, progress)
        else:
            self.encoder = attached.encoder
            self.frozen = backbone.model

    def __len__(self) -> int:
        """Number of distinct texts."""
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Number of vectors or states that the whole catalogue becomes."""
        return int(self._sizes[self.text_of].sum())

    def encode(self, encoder: nn.Module, items: NDArray[np.int64]) -> Tensor:
        """Encode items, with gradients where the caller has them on.

        With several processes each encodes a share and all get the whole; gradients flow as if one had done it all.

        Args:
            encoder: `self.encoder`, `self.frozen`, or a wrapped form of either.
            items: (M,) rows of the catalogue.
        Returns:
            (M, D) float32 of unit length; or where this encoder is `per_token` (T, D) float32, the states of every
            token of the first item, then of the second, without padding.
        """
        texts, place = np.unique(self.text_of[items], return_inverse=True)
        own = texts[self.process :: self.processes]
        # With more processes than texts an idle one must still touch every weight: the others wait for its gradients.
        encoded = self._encode(encoder, own if len(own) else texts[:1])[: int(self._sizes[own].sum())]
        sizes = self._sizes[texts]
        whole = gather_shares(encoded, sizes, self.process, self.processes)
        rows = _ragged((np.cumsum(sizes) - sizes)[place], sizes[place])
        return whole[torch.from_numpy(rows).to(whole.device)]

    @torch.inference_mode()
    def catalogue(self, encoder: nn.Module, items: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Encode `items`, or all of them, without gradients; see `encode`."""
        chosen = np.arange(len(self.text_of)) if items is None else items
        encoded: NDArray[np.float32] = self.encode(encoder, chosen).cpu().numpy()
        return encoded

    def _encode(self, encoder: nn.Module, texts: NDArray[np.int64]) -> Tensor:
        """Encode texts by number, (K,) -> (K, D), or the states of all their tokens."""
        lengths = self.tokens.lengths[texts]
        chunks = list(length_sorted_chunks(lengths)) if self._fast else [np.arange(len(texts))]
        encoded = []
        for chunk in chunks:
            rows = texts[chunk]
            if self._cache is None:
                ids, mask = (part.to(self._backbone.device) for part in self.tokens.padded(rows, self._backbone.pad_id))
                hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                states, mask = self._cached(rows)
                hidden = encoder(inputs_embeds=states, attention_mask=mask).last_hidden_state
            encoded.append(hidden[mask.bool()].float() if self.per_token else self._backbone.pool(hidden, mask))
        if not encoded:
            return torch.empty(0, self._backbone.dim, device=self._backbone.device)
        order, sizes = np.concatenate(chunks), self._sizes[texts]
        starts = np.empty(len(order), np.int64)
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        return torch.cat(encoded)[torch.from_numpy(_ragged(starts, sizes)).to(encoded[0].device)]

    def _cached(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the states (B, L, D) that enter the first layer in training, and their mask (B, L)."""
        assert self._cache is not None
        lengths = self.tokens.lengths[rows]
        position = np.arange(int(lengths.max()))
        mask = position < lengths[:, None]
        # What stands in padded places is some other text's state: never attended to, never pooled.
        source = np.minimum(self.tokens.offsets[rows][:, None] + position, len(self._cache) - 1)
        device = self._backbone.device
        return self._cache[torch.from_numpy(source)].to(device), torch.from_numpy(mask.astype(np.int64)).to(device)

    @torch.no_grad()
    def _fill_cache(
        self, lower: nn.Module, limit: int, scratch: Path | None, progress: Callable[[int], None] | None
    ) -> None:
        shape = (len(self.tokens.ids), self._backbone.dim)
        self.cached_bytes = 4 * shape[0] * shape[1]
        if self.cached_bytes <= limit:
            cache = torch.empty(shape)
        else:
            self._spill = tempfile.TemporaryDirectory(prefix="layer-cache-", dir=scratch)
            file = Path(self._spill.name) / "states.f32"
            cache = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
        for chunk in length_sorted_chunks(self.tokens.lengths, CHUNK_TOKENS):
            ids, mask = (part.to(self._backbone.device) for part in self.tokens.padded(chunk, self._backbone.pad_id))
            states = lower(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu()
            source = self.tokens.offsets[chunk][:, None] + np.arange(ids.shape[1])
            real = mask.bool().cpu()
            cache[torch.from_numpy(source)[real]] = states[real]
            if progress is not None:
                progress(len(chunk))
        self._cache = cache

    def close(self) -> None:
        """Give back the cache, and the file behind it where there is one."""
        self._cache = None
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None


class _GatherShares(torch.autograd.Function):
    """All-gather of shares of any length; row `i` of the whole is row `source[i]` of the shares padded and joined."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, share: Tensor, source: Tensor, longest: int, process: int,
        processes: int,
    ) -> Tensor:  # fmt: skip
        own = torch.nonzero(torch.div(source, longest, rounding_mode="floor") == process)[:, 0]
        context.own = own[torch.argsort(source[own])]  # type: ignore[attr-defined]
        context.processes = processes  # type: ignore[attr-defined]
        padded = share.new_zeros(longest, share.shape[1])
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(processes)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat(parts)[source]  # (W * longest, D) -> (total, D)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, processes = context.own, context.processes  # type: ignore[attr-defined]
        # Every process computes the whole loss from the whole gather, so its own rows of the gradient are complete.
        # Data-parallel training then averages over processes, which share the rows out: hence the factor.
        return gradient[own] * processes, None, None, None, None


def gather_shares(share: Tensor, sizes: NDArray[np.int64], process: int, processes: int) -> Tensor:
    """Put together what all processes made of their texts; process ``p`` has ``texts[p::processes]``.

    The loss behind it must be the same on every process, as it is where each works on the whole batch.

    Args:
        share: (rows of this process's texts, D). sizes: (K,) rows that each of all texts has.
    Returns:
        (sum of sizes, D), the first text's rows first; the same on every process.
    """
    if processes == 1:
        return share
    longest = max(1, *(int(sizes[p::processes].sum()) for p in range(processes)))
    starts = np.empty(len(sizes), np.int64)
    for p in range(processes):
        own = sizes[p::processes]
        starts[p::processes] = p * longest + np.cumsum(own) - own
    source = torch.from_numpy(_ragged(starts, sizes)).to(share.device)
    gathered: Tensor = _GatherShares.apply(share, source, longest, process, processes)  # type: ignore[no-untyped-call]
    return gathered


def _ragged(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``starts[0], starts[0] + 1, ...`` of `sizes[0]` numbers, then the same for the next, as one array."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(int(sizes.sum()))
