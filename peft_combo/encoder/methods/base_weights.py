"""Full and partial fine-tuning: some of the encoder's own weights learn, in copies of their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from peft_combo.encoder.architectures import (
    copy_sharing_weights,
    find_architecture,
    find_layers,
    find_top_modules,
    first_top_layer,
    model_type,
)
from peft_combo.encoder.methods.attached import AttachedAdapter, find_first_layer, set_parameter
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe.adapter import BitfitTuning, FullTuning, TopLayers

TUNED_WEIGHTS_FILE = "tuned_weights.safetensors"


class TunedWeights(AttachedAdapter):
    """Some weights of the encoder, trained; the file holds them and no others."""

    def __init__(self, base: nn.Module, encoder: nn.Module, *, first_layer: int, max_length: int) -> None:
        super().__init__(base, encoder, encoder, first_layer=first_layer, max_length=max_length, stored_as="weights")

    def save(self, folder: Path, base_name: str) -> None:
        tuned = {name: p.detach().contiguous() for name, p in self.trainable().items()}
        save_file(tuned, folder / TUNED_WEIGHTS_FILE, metadata={"format": "pt"})


def attach_weights(model: nn.Module, config: BitfitTuning | TopLayers | FullTuning, max_length: int) -> TunedWeights:
    """Let weights of a copy of `model` learn.

    Raises:
        BackboneError: there are none of the kind, they are quantised, or there are fewer layers.
    """
    encoder = copy_sharing_weights(model)
    first_layer = 0
    match config:
        case BitfitTuning():
            names = _biases(encoder, config.top_layers)
            first_layer = find_first_layer(encoder, config.top_layers)
        case TopLayers():
            depth = len(find_layers(encoder))
            if config.layers > depth:
                raise BackboneError(f"adapter.layers: expected at most {depth}, found {config.layers}.")
            path = find_architecture(encoder).layers
            first = first_top_layer(encoder, config.layers)
            names = [
                name
                for name, _ in encoder.named_parameters()
                if name.startswith(f"{path}.") and int(name.removeprefix(f"{path}.").split(".")[0]) >= first
            ]
            first_layer = find_first_layer(encoder, config.layers)
        case FullTuning():
            names = [name for name, _ in encoder.named_parameters()]
    _own(encoder, names)
    return TunedWeights(model, encoder, first_layer=first_layer, max_length=max_length)


def load_weights(model: nn.Module, folder: Path, max_length: int) -> TunedWeights:
    """Read what `Weights.save` wrote into a copy of `model`.

    Raises:
        StoreError: a tensor has no place in the encoder.
    """
    encoder = copy_sharing_weights(model)
    parameters = dict(encoder.named_parameters())
    for name, tensor in load_file(folder / TUNED_WEIGHTS_FILE).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise StoreError(f"{folder / TUNED_WEIGHTS_FILE}: {name} does not fit the encoder.")
        set_parameter(encoder, name, nn.Parameter(tensor.to(parameters[name].device), requires_grad=False))
    return TunedWeights(model, encoder, first_layer=0, max_length=max_length)


def _biases(model: nn.Module, top_layers: int | None) -> list[str]:
    """Return the biases that can learn: all but those of keys, which shift every score of a query alike.

    Softmax is blind to that, so their gradient is rounding noise (the paper finds them without effect, section 3).
    """
    keys = find_architecture(model).key_value[0]
    reached = find_top_modules(model, top_layers)
    names = [
        f"{name}.bias"
        for name, module in reached.items()
        if isinstance(getattr(module, "bias", None), nn.Parameter) and not (name.endswith(f".{keys}"))
    ]
    if not names:
        raise BackboneError(
            f"adapter.method: bitfit trains biases, and this {model_type(model)} encoder has none. Use layer-norm or "
            "lora."
        )
    return names


def _own(model: nn.Module, names: Iterable[str]) -> None:
    """Give `model` trainable copies of its own of the parameters `names`."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        if not parameter.is_floating_point():
            raise BackboneError(
                "adapter.method: weights that are quantised cannot be trained. Set backbone.quantization: none, "
                "or use lora."
            )
        set_parameter(model, name, nn.Parameter(parameter.detach().clone(), requires_grad=True))
