"""BERT-like architectures: names of layers, embeddings and linear modules in each, and views of a part of one.

Owns the map from a transformers ``model_type`` to its stack of layers and its linear modules, copies that share
weights, and the lower and upper view of an encoder. Knows nothing of PEFT, tokenizers or files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from peft_combo.errors import BackboneError, did_you_mean

TargetSet = Literal["query+value", "attention", "attention+ffn"]


@dataclass(frozen=True)
class Architecture:
    """Names inside one family of encoders.

    Attributes:
        layers: path of the ``ModuleList`` of layers.
        query_value: modules of a layer that make queries and values (fused projections count).
        key_value: modules of a layer that make keys and values, the keys first.
        attention: all linear modules of a layer's attention, the one that leads back into the layer last.
        ffn: the linear modules of a layer's feed-forward part, in the order they are passed.
        embeddings: path of the module that turns token ids into the first hidden states.
        between: modules between the embeddings and the first layer, skipped by an upper view.
        after: modules behind the last layer, skipped by a lower view.
        splittable: whether the stack can be cut; not where layers share their weights (ALBERT) or the encoder
            keeps hidden states of its own (DeBERTa).
        prefix: whether the encoder attends to a key-value cache handed in from outside, as prefix tuning needs.
    """

    layers: str
    query_value: tuple[str, ...]
    key_value: tuple[str, ...]
    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    embeddings: str = "embeddings"
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    splittable: bool = True
    prefix: bool = False


_BERT = Architecture(
    layers="encoder.layer",
    query_value=("attention.self.query", "attention.self.value"),
    key_value=("attention.self.key", "attention.self.value"),
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ffn=("intermediate.dense", "output.dense"),
    between=("embeddings_project",),
    prefix=True,
)

_ROBERTA = ("roberta", "xlm-roberta", "camembert")

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        query_value=("attention.q_lin", "attention.v_lin"),
        key_value=("attention.k_lin", "attention.v_lin"),
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ffn=("ffn.lin1", "ffn.lin2"),
    ),
    "modernbert": Architecture(
        layers="layers",
        query_value=("attn.Wqkv",),
        key_value=("attn.Wqkv",),
        attention=("attn.Wqkv", "attn.Wo"),
        ffn=("mlp.Wi", "mlp.Wo"),
        after=("final_norm",),
    ),
    "mpnet": Architecture(
        layers="encoder.layer",
        query_value=("attention.attn.q", "attention.attn.v"),
        key_value=("attention.attn.k", "attention.attn.v"),
        attention=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        ffn=("intermediate.dense", "output.dense"),
    ),
    "albert": Architecture(
        layers="encoder.albert_layer_groups.0.albert_layers",
        query_value=("attention.query", "attention.value"),
        key_value=("attention.key", "attention.value"),
        attention=("attention.query", "attention.key", "attention.value", "attention.dense"),
        ffn=("ffn", "ffn_output"),
        splittable=False,
    ),
    "deberta-v2": Architecture(
        layers="encoder.layer",
        query_value=("attention.self.query_proj", "attention.self.value_proj"),
        key_value=("attention.self.key_proj", "attention.self.value_proj"),
        attention=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        ffn=("intermediate.dense", "output.dense"),
        splittable=False,
    ),
}


def model_type(model: nn.Module) -> str:
    """Return the transformers name of the architecture."""
    config: Any = model.config
    return str(config.model_type)


def count_usable_positions(model: nn.Module) -> int:
    """Return how many tokens fit, special tokens included; RoBERTa's kin count from behind the padding id."""
    config: Any = model.config
    positions = int(config.max_position_embeddings)
    return positions - (int(config.pad_token_id or 0) + 1) if config.model_type in _ROBERTA else positions


def find_architecture(model: nn.Module) -> Architecture:
    """Return the names inside `model`.

    Raises:
        BackboneError: the ``model_type`` is not one we know.
    """
    name = model_type(model)
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise BackboneError(
            f'The encoder\'s architecture "{name}" is not known here. Known: {", ".join(sorted(ARCHITECTURES))}. '
            f"{did_you_mean(name, ARCHITECTURES)}".rstrip()
        ) from None


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of layers of `model`."""
    layers = model.get_submodule(find_architecture(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def find_layer_number(model: nn.Module, parameter: str) -> int | None:
    """Return the layer of `model` that a parameter is in, by its name there or inside a wrapper; None for none."""
    found = re.search(rf"(?:^|\.){re.escape(find_architecture(model).layers)}\.(\d+)\.", parameter)
    return int(found[1]) if found else None


def find_target_modules(model: nn.Module, targets: TargetSet | Sequence[str], top_layers: int | None) -> list[str]:
    """Return the full names of the linear modules an adapter sits on.

    Full names, not suffixes: they mean the same to every PEFT method, and ``pooler.dense`` can never slip in (a LoRA
    there gets no gradient under mean pooling, which stops data-parallel training at the second step).

    Args:
        targets: a named group, or module names inside a layer (``attention.self.query``).
        top_layers: only the last so many layers; None for all.
    Raises:
        BackboneError: a name that no layer has, or more layers than there are.
    """
    architecture = find_architecture(model)
    layers = find_layers(model)
    match targets:
        case "query+value":
            names: tuple[str, ...] = architecture.query_value
        case "attention":
            names = architecture.attention
        case "attention+ffn":
            names = architecture.attention + architecture.ffn
        case _:
            names = tuple(targets)
    known = [name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        # ModernBERT's first layer lacks a norm but no linear module, so one layer speaks for all.
        if name not in known:
            raise BackboneError(
                f'adapter.targets: no linear module "{name}" in a layer of {model_type(model)}. '
                f"Found: {', '.join(known)}. {did_you_mean(name, known)}".rstrip()
            )
    first = first_top_layer(model, top_layers)
    return [f"{architecture.layers}.{index}.{name}" for index in range(first, len(layers)) for name in names]


def first_top_layer(model: nn.Module, top_layers: int | None) -> int:
    """Return the index of the lowest of the last `top_layers` layers; 0 for None.

    Raises:
        BackboneError: the encoder has fewer layers.
    """
    depth = len(find_layers(model))
    if top_layers is not None and top_layers > depth:
        raise BackboneError(
            f"adapter.top_layers: expected at most {depth} (the encoder has so many layers), found {top_layers}."
        )
    return 0 if top_layers is None else depth - top_layers


def find_top_modules(model: nn.Module, top_layers: int | None) -> dict[str, nn.Module]:
    """Return, by full name, the modules in the last `top_layers` layers and behind them; for None all there are.

    Raises:
        BackboneError: the encoder has fewer layers.
    """
    first = first_top_layer(model, top_layers)
    if top_layers is None:
        return dict(model.named_modules())
    architecture = find_architecture(model)
    reached = [f"{architecture.layers}.{index}" for index in range(first, len(find_layers(model)))]
    reached += architecture.after
    return {
        name: module
        for name, module in model.named_modules()
        if any(name == place or name.startswith(f"{place}.") for place in reached)
    }


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with modules of its own and the very same parameters and buffers.

    An adapter injected into the copy leaves `model` and every other copy as they were, so adapters of any method live
    side by side over one set of frozen weights, with nothing to switch. A copy of MiniLM costs about 2 ms and 0.4 MiB.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            memo[id(module)] = _copy_shallow(
                module
            )  # its quantised state lives outside parameters and is only ever read
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


class _Hidden(nn.Module):
    """Stands where the embeddings were and passes on the hidden states it is handed."""

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **_: Any) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        return next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())


def lower_view(model: nn.Module, cut: int) -> nn.Module:
    """Return the embeddings and the first `cut` layers of `model` as an encoder that shares its modules.

    Its ``last_hidden_state`` is what the layer number `cut` receives.
    """
    architecture = find_architecture(model)
    view = _replace_child(model, architecture.layers, nn.ModuleList(find_layers(model)[:cut]))
    for name in architecture.after:
        view = _replace_child(view, name, nn.Identity())
    return view


def upper_view(model: nn.Module, cut: int) -> nn.Module:
    """Return the layers of `model` from number `cut` on, as an encoder fed through ``inputs_embeds``.

    ``upper_view(m, c)(inputs_embeds=lower_view(m, c)(ids, mask).last_hidden_state, attention_mask=mask)`` equals
    ``m(ids, mask)``: attention masks and rotary positions are made by the model's own forward, as for the whole.
    """
    architecture = find_architecture(model)
    view = _replace_child(model, architecture.layers, nn.ModuleList(find_layers(model)[cut:]))
    view = _replace_child(view, architecture.embeddings, _Hidden())
    for name in architecture.between:
        if hasattr(view, name):
            view = _replace_child(view, name, nn.Identity())
    return view


def _replace_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` in which the module at `path` is `child`; all else is shared."""
    name, _, rest = path.partition(".")
    twin = _copy_shallow(module)
    inner = twin._modules[name]
    assert inner is not None
    twin._modules[name] = _replace_child(inner, rest, child) if rest else child
    return twin


def _copy_shallow(module: nn.Module) -> nn.Module:
    """Return a shallow copy of `module`: the same children and tensors, either of which can be set in it alone."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._parameters = dict(module._parameters)
    return twin


def set_training(model: nn.Module, cut: int, training: bool) -> None:
    """Set the layers from `cut` on to `training`, everything below to evaluation.

    What is frozen and below every adapter gives the same output at each step, so it may be cached; dropout there
    would only be noise that no adapter can answer.
    """
    model.eval()
    for layer in find_layers(model)[cut:]:
        layer.train(training)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the encoder's own dropout (hidden and attention) to `rate`; an adapter's dropout is not touched."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not any(own in name for own in ("lora_dropout", "vera_dropout")):
            module.p = rate
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = rate  # ModernBERT hands a number to its attention instead


def count_bytes(module: nn.Module) -> int:
    """Return the bytes of all distinct parameters and buffers under `module`."""
    seen: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
