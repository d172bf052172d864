"""Prompt tuning, P-tuning and prefix tuning: trained positions before those of the text.

None of them starts as the frozen encoder, and none can be cached below: the positions count in every layer.
"""

from __future__ import annotations

from typing import Any

import peft
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from peft_combo.encoder.architectures import copy_sharing_weights, count_usable_positions, find_architecture, model_type
from peft_combo.encoder.methods.attached import NAME, PeftAdapter
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import PrefixAdapter, PromptAdapter, PTuningAdapter


class _TextOnly(nn.Module):
    """An encoder whose prompt has done its work: of the states only the text's are returned, as without a prompt."""

    def __init__(self, wrapped: Any, length: int) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.length = length

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        states = self.wrapped(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=states[:, self.length :])  # (B, P + L, D) -> (B, L, D)


class _TrainingLstm(nn.LSTM):
    """An LSTM that stays in training mode: cuDNN takes gradients in no other, and without dropout both are the same."""

    def train(self, mode: bool = True) -> _TrainingLstm:
        return super().train(True)


def is_prompt_method(model: nn.Module, wrapped: Any, max_length: int) -> PeftAdapter:
    """Return the adapter of a prompt-learning model that PEFT made or read.

    Raises:
        BackboneError: the virtual tokens leave too few positions.
    """
    config = wrapped.peft_config[NAME]
    length = config.num_virtual_tokens
    room = count_usable_positions(model) - length  # virtual tokens take the first positions
    if room < 8:
        raise BackboneError(
            f"adapter.length: {length} virtual tokens leave {room} of the encoder's {length + room} positions for "
            "text. Use a shorter one."
        )
    for module in wrapped.modules():
        if type(module) is nn.LSTM and not module.dropout:
            module.__class__ = _TrainingLstm
            module.train()
    # A prefix lies in the cache of keys and values, a prompt among the states.
    encoder = None if config.peft_type == peft.PeftType.PREFIX_TUNING else _TextOnly(wrapped, length)
    return PeftAdapter(model, wrapped, first_layer=0, max_length=min(max_length, room), encoder=encoder)


def attach_prompt(
    model: nn.Module, config: PromptAdapter | PTuningAdapter | PrefixAdapter, max_length: int
) -> PeftAdapter:
    """Put trained positions before those of the text, in a copy of `model`.

    Raises:
        BackboneError: the architecture would ignore a prefix, or too few positions would be left.
    """
    encoder = copy_sharing_weights(model)
    embedding: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    sizes: Any = encoder.config
    # Said in full, since PEFT looks for names that not every architecture's config has, and takes the width of the
    # layers for that of the embeddings, which ELECTRA and ALBERT keep apart.
    shape = {
        "task_type": "FEATURE_EXTRACTION",
        "num_virtual_tokens": config.length,
        "num_layers": int(sizes.num_hidden_layers),
        "num_attention_heads": int(sizes.num_attention_heads),
        "token_dim": embedding.embedding_dim,
    }
    made: Any
    match config:
        case PromptAdapter():
            # From embeddings of real words: a random start is far from anything the layers have seen (Lester et al.).
            made = peft.PromptTuningConfig(**shape, prompt_tuning_init="SAMPLE_VOCAB")
        case PTuningAdapter():
            made = peft.PromptEncoderConfig(
                **shape, encoder_reparameterization_type=config.network.upper(), encoder_hidden_size=config.network_size
            )
        case PrefixAdapter():
            if not find_architecture(encoder).prefix:
                raise BackboneError(
                    f'adapter.method: "prefix" does not work on {model_type(encoder)}: its attention takes no outside '
                    "keys and values, so the prefix would be ignored. Use prompt or lora."
                )
            made = peft.PrefixTuningConfig(
                **(shape | {"token_dim": int(sizes.hidden_size)}),
                prefix_projection=config.projection, encoder_hidden_size=config.projection_size,
            )  # fmt: skip
    return is_prompt_method(model, peft.get_peft_model(encoder, made), max_length)
