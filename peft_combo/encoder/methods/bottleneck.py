"""Bottleneck adapters: a narrow network of two layers at a sublayer of each layer. Not in PEFT, so ours.

Houlsby et al. 2019 put one behind the attention and one behind the feed-forward part, before each is added back to the
stream; Pfeiffer et al. 2021 keep the second; He et al. 2022 let one run beside the feed-forward part. The norms stay
frozen, unlike in Houlsby et al., so that the adapter is nothing but its own tensors.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_combo.encoder.architectures import copy_sharing_weights, find_architecture, find_target_modules
from peft_combo.encoder.methods.attached import AttachedAdapter, find_first_layer, set_module
from peft_combo.errors import StoreError
from peft_combo.recipe.adapter import BottleneckAdapter

CONFIG_FILE = "bottleneck_config.json"
WEIGHTS_FILE = "bottleneck.safetensors"


class _Narrow(nn.Module):
    """``s W_up relu(W_down x)``, (..., I) -> (..., O); W_up starts at zero, so the encoder starts as it is."""

    def __init__(self, width_in: int, width_out: int, size: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, size)
        self.up = nn.Linear(size, width_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(torch.relu(self.down(x)))
        return self.scale * out


class _Behind(nn.Module):
    """A linear layer, and a bottleneck over its output."""

    def __init__(self, base: nn.Module, narrow: _Narrow) -> None:
        super().__init__()
        self.base = base
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        moved: Tensor = out + self.narrow(out)
        return moved


class _Entry(nn.Module):
    """The linear layer a sublayer begins with; what it is given is kept for the bottleneck beside the sublayer."""

    def __init__(self, base: nn.Module, seen: threading.local) -> None:
        super().__init__()
        self.base = base
        self._seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self._seen.x = x
        out: Tensor = self.base(x)
        return out


class _Beside(nn.Module):
    """The linear layer a sublayer ends with; the bottleneck's output over the sublayer's input is added to its own."""

    def __init__(self, base: nn.Module, narrow: _Narrow, seen: threading.local) -> None:
        super().__init__()
        self.base = base
        self.narrow = narrow
        self._seen = seen

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.narrow(self._seen.x)
        self._seen.x = None
        return out


class Bottleneck(AttachedAdapter):
    """Bottlenecks in an encoder copy, saved as tensors and the recipe's adapter section."""

    def __init__(self, base: nn.Module, encoder: nn.Module, config: BottleneckAdapter, *, max_length: int) -> None:
        first_layer = find_first_layer(encoder, config.top_layers)
        super().__init__(base, encoder, encoder, first_layer=first_layer, max_length=max_length, stored_as="bottleneck")
        self._config = config

    def save(self, folder: Path, base_name: str) -> None:
        state = {name: t.detach().contiguous() for name, t in tensors(self.encoder).items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        fields = {**self._config.model_dump(mode="json"), "base_model_name_or_path": base_name}
        (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def tensors(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Return the bottlenecks' own tensors by name."""
    return {name: p for name, p in encoder.named_parameters() if ".narrow." in name}


def attach_bottleneck(model: nn.Module, config: BottleneckAdapter, max_length: int) -> Bottleneck:
    """Put bottlenecks into a copy of `model`.

    Raises:
        BackboneError: the encoder has fewer layers.
    """
    encoder = copy_sharing_weights(model)
    architecture = find_architecture(encoder)
    first, last = architecture.ffn[0], architecture.ffn[-1]
    if config.placement == "parallel":
        entries = find_target_modules(encoder, [first], config.top_layers)
        exits = find_target_modules(encoder, [last], config.top_layers)
        for entry, exit_ in zip(entries, exits, strict=True):
            seen = threading.local()  # an encoder serves several threads, each with a text of its own
            begin, end = encoder.get_submodule(entry), encoder.get_submodule(exit_)
            assert isinstance(begin, nn.Linear)
            assert isinstance(end, nn.Linear)
            narrow = _Narrow(begin.in_features, end.out_features, config.size, config.scale)
            set_module(encoder, entry, _Entry(begin, seen))
            set_module(encoder, exit_, _Beside(end, narrow.to(_device(end)), seen))
    else:
        sublayers = [architecture.attention[-1], last] if config.placement == "houlsby" else [last]
        for name in find_target_modules(encoder, sublayers, config.top_layers):
            linear = encoder.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            narrow = _Narrow(linear.out_features, linear.out_features, config.size, config.scale)
            set_module(encoder, name, _Behind(linear, narrow.to(_device(linear))))
    return Bottleneck(model, encoder, config, max_length=max_length)


def _device(module: nn.Linear) -> torch.device:
    return module.weight.device


def load_bottleneck(model: nn.Module, folder: Path, max_length: int) -> Bottleneck:
    """Read what `Bottleneck.save` wrote into a copy of `model`.

    Raises:
        StoreError: the config is not one of ours, or the tensors are not those the encoder takes.
    """
    fields = json.loads((folder / CONFIG_FILE).read_text())
    if isinstance(fields, dict):
        fields.pop("base_model_name_or_path", None)
    try:
        config = BottleneckAdapter.model_validate(fields)
    except ValidationError as error:
        raise StoreError(f"{folder / CONFIG_FILE} is not a bottleneck's config: {error.errors()[0]['msg']}") from error
    attached = attach_bottleneck(model, config, max_length)
    wanted, written = tensors(attached.encoder), load_file(folder / WEIGHTS_FILE)
    odd = sorted({*wanted} ^ {*written}) or sorted(n for n in wanted if wanted[n].shape != written[n].shape)
    if odd:
        raise StoreError(f"{folder / WEIGHTS_FILE}: its tensors are not those the encoder takes, for example {odd[0]}.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(written[name])
    return attached
