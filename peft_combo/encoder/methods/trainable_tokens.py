"""Trainable tokens: the embeddings of chosen words learn, every other word keeps its own."""

from __future__ import annotations

import functools
from typing import Any

import peft
import torch
from torch import Tensor, nn

from peft_combo.encoder.architectures import copy_sharing_weights
from peft_combo.encoder.methods.attached import NAME, ReplacingAdapter
from peft_combo.errors import BackboneError, did_you_mean
from peft_combo.recipe.adapter import TokensAdapter


class TrainableTokens(ReplacingAdapter):
    """Rows of the embedding table with values of their own; the table itself is shared and stays."""

    def __init__(self, base: nn.Module, wrapped: Any, *, max_length: int) -> None:
        super().__init__(base, wrapped, first_layer=0, max_length=max_length)
        module = self.inner.get_submodule(_find_embedding(self.inner))
        places = torch.full((base.get_submodule(_find_embedding(base)).num_embeddings,), -1)  # type: ignore[arg-type]
        chosen = module.token_indices[NAME]  # type: ignore[index]
        places[torch.tensor(chosen)] = torch.arange(len(chosen))
        module.forward = functools.partial(_with_chosen_rows, module, places)


def _with_chosen_rows(module: Any, places: Tensor, ids: Tensor) -> Tensor:
    """Look up (B, L) ids. PEFT's own forward copies the whole table, tens of MB, for every batch."""
    place = places.to(ids.device)[ids]  # (B, L), -1 where the shared table answers
    own = module.trainable_tokens_delta[NAME][place.clamp(min=0)]
    return torch.where((place >= 0).unsqueeze(-1), own, module.base_layer(ids))


def attach_tokens(model: nn.Module, config: TokensAdapter, max_length: int, tokenizer: Any) -> TrainableTokens:
    """Let the embeddings of some words learn, in a copy of `model`.

    Args:
        tokenizer: the encoder's own; says which token a word is.
    Raises:
        BackboneError: a word that is not one token.
    """
    if tokenizer is None:
        raise BackboneError("adapter.method: tokens needs the encoder's tokenizer to know what a word is.")
    encoder = copy_sharing_weights(model)
    chosen = sorted({_token_of(word, tokenizer) for word in config.words})
    wrapped = peft.get_peft_model(
        encoder,
        peft.TrainableTokensConfig(
            task_type="FEATURE_EXTRACTION", token_indices=chosen, target_modules=[_find_embedding(encoder)]
        ),
    )
    return TrainableTokens(model, wrapped, max_length=max_length)


def _token_of(word: str, tokenizer: Any) -> int:
    """Return the id of a word that is one token, written as in a text or as in the vocabulary (``##er``)."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if word in vocabulary:
        return vocabulary[word]
    pieces: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id:
        return pieces[0]
    if not pieces or tokenizer.unk_token_id in pieces:
        raise BackboneError(
            f'adapter.words: expected words the tokenizer knows, found "{word}". '
            f"{did_you_mean(word, vocabulary) or 'Leave it out.'}"
        )
    spelled = ", ".join(tokenizer.convert_ids_to_tokens(pieces))
    raise BackboneError(
        f'adapter.words: expected words of one token each, found "{word}", which is {len(pieces)}: {spelled}. Name the '
        "pieces themselves to train them; other words that use them change too."
    )


def _find_embedding(model: nn.Module) -> str:
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[table]
