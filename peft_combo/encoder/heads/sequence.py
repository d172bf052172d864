"""Sequence head: a causal transformer decoder over item vectors that predicts the next item of a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_combo.encoder.heads.completion import CompletionHead, project
from peft_combo.recipe.task import SequenceTask


class SequenceHead(CompletionHead):
    """Says what comes next after a set of items, which may be empty, and whether the set is complete.

    A block lets the state of a place, at first the mean of the items before it, look at these items and at the begin
    token. Every block adds to its input and what it adds starts at zero, so an untrained head scores like cosine.

    Source: Vaswani et al. 2017 for the block, normalised at its entrance as in Xiong et al. 2020; states that look at
        items which do not look back as in the query stream of XLNet, Yang et al. 2019, section 2.3.
    """

    kind = "sequence"
    described_by = SequenceTask
    config: SequenceTask
    size_log_odds: Tensor

    def __init__(self, dim: int, config: SequenceTask) -> None:
        super().__init__(dim, config)
        self.begin = nn.Parameter(torch.full((dim,), dim**-0.5))
        self.member_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(_Block(dim, config, seed) for seed in range(config.layers))
        self.end = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(self.end.weight)
        # Counted, not learned: how often a training bundle of so many items has no further one.
        self.register_buffer("size_log_odds", torch.zeros(config.sizes + 1))

    def query(self, items: Tensor, contexts: Tensor) -> Tensor:
        """Encode sets of items, see `CompletionHead`; a set may be empty."""
        return self._states(items, contexts, (contexts >= 0)[:, None])[:, 0]

    def prefixes(self, items: Tensor, sequences: Tensor) -> Tensor:
        """Encode all beginnings of sequences at once.

        Args:
            items: (M, D) item vectors.
            sequences: (B, L) rows of `items`, -1 behind the end of a shorter one.
        Returns:
            (B, L + 1, D) of unit length: at place t what `query` says of the first t items. Behind the end of a
            sequence it is the whole of it again.
        """
        length = sequences.shape[1]
        before = torch.ones(length + 1, length, dtype=torch.bool, device=sequences.device).tril(-1)  # (L + 1, L)
        return self._states(items, sequences, before & (sequences >= 0)[:, None])

    def completeness(self, queries: Tensor, sizes: Tensor) -> Tensor:
        """Return the log-odds that a set is a whole bundle: (Q, D) what `query` made of it, (Q,) its items -> (Q,)."""
        judged: Tensor = self.end(queries)[:, 0]
        return self.size_log_odds[sizes.clamp(max=self.config.sizes)] + judged

    def step_weights(self) -> list[Tensor]:
        return super().step_weights() + [weight for block in self._each() for weight in block.exits()]

    def _each(self) -> Iterable[_Block]:
        return cast("Iterable[_Block]", self.blocks)

    def _states(self, items: Tensor, members: Tensor, visible: Tensor) -> Tensor:
        """Encode places that see some members each: (B, L) rows, (B, T, L) bool -> (B, T, D) of unit length."""
        none = items.new_zeros(1, items.shape[1])  # what stands in places without an item; never looked at
        rows = torch.cat([items, none])[members]  # (B, L, D); -1 is the last row
        count = visible.sum(-1, keepdim=True)  # (B, T, 1)
        mean = visible.to(rows.dtype) @ rows / count.clamp_min(1)  # (B, T, L) @ (B, L, D) -> (B, T, D)
        state = self.dropout(torch.where(count > 0, mean, self.begin))
        begin = self.begin.expand(len(members), 1, -1)
        memory = self.member_norm(torch.cat([begin, rows], 1))  # (B, 1 + L, D)
        seen = functional.pad(visible, (1, 0), value=True)  # (B, T, 1 + L): the begin token by every place
        for block in self._each():
            state = block(state, memory, seen)
        return project(state, self.query_projection)


class _Block(nn.Module):
    """Attention to what a place may see, then a hidden layer; see `SequenceHead`."""

    def __init__(self, dim: int, config: SequenceTask, seed: int) -> None:
        super().__init__()
        self.heads = config.attention_heads
        # Normalised states are sqrt(dim) long, items 1: without this what is added soon drowns the items.
        self.scale = dim**-0.5
        self.dropout = nn.Dropout(config.head_dropout)
        self.state_norm, self.hidden_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, config.width, bias=False) for _ in range(3))
        self.attended = nn.Linear(config.width, dim, bias=False)
        self.entrance, self.exit = nn.Linear(dim, config.width), nn.Linear(config.width, dim)
        generator = torch.Generator().manual_seed(seed)  # the weights of a head are a function of its description
        for layer in (self.query, self.key, self.value, self.entrance):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        for bias in (self.entrance.bias, self.exit.bias):
            nn.init.zeros_(bias)
        for layer in (self.attended, self.exit):
            nn.init.zeros_(layer.weight)

    def exits(self) -> list[Tensor]:
        """Return the weights whose products are all that a block adds."""
        return [self.attended.weight, self.exit.weight, self.exit.bias]

    def forward(self, state: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Add to (B, T, D) states what they see, (B, T, L) bool, of (B, L, D) memory."""
        query, key, value = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T or L, width / H)
            for layer, rows in ((self.query, self.state_norm(state)), (self.key, memory), (self.value, memory))
        )
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None])
        state = state + self.scale * self.dropout(self.attended(found.transpose(1, 2).flatten(-2)))
        hidden = functional.gelu(self.entrance(self.hidden_norm(state)))
        added: Tensor = state + self.scale * self.dropout(self.exit(hidden))
        return added
