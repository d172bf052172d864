"""Attached adapter: what all methods have in common, and the files of PEFT.

Owns the interface the training loop, the bank and the backbone use. Knows no method.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_combo.encoder.architectures import find_architecture, first_top_layer

CONFIG_FILE = "adapter_config.json"  # PEFT's own names, so that plain PEFT opens the folder
WEIGHTS_FILE = "adapter_model.safetensors"

# Each encoder copy holds one adapter, so PEFT's internal name never matters; "default" makes PEFT save flat files.
NAME = "default"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are moved alike.

    Attributes:
        rate: their learning rate as a multiple of the recipe's.
        decayed: whether weight decay pulls them towards zero.
    """

    parameters: list[nn.Parameter]
    rate: float
    decayed: bool


class AttachedAdapter:
    """An adapter inside an encoder copy. As it stands: none at all, the control in which a task's head learns alone.

    Attributes:
        base: the encoder it was put into a copy of; left as it is, so it is also the way to do without the adapter.
        encoder: call it with ``input_ids`` and ``attention_mask`` (B, L); returns ``last_hidden_state`` (B, L, D).
        inner: the transformers model inside `encoder`, the injected modules in place.
        first_layer: index of the lowest layer the adapter touches; what is below is as in the frozen encoder.
        max_length: the most tokens a text may have.
        stored_as: what the saved files are: a PEFT type, ``bottleneck``, ``weights`` or ``head``.
    """

    def __init__(
        self,
        base: nn.Module,
        encoder: nn.Module,
        inner: nn.Module,
        *,
        first_layer: int,
        max_length: int,
        stored_as: str,
    ) -> None:
        self.base = base
        self.encoder = encoder
        self.inner = inner
        self.first_layer = first_layer
        self.max_length = max_length
        self.stored_as = stored_as

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name."""
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def groups(self) -> list[ParameterGroup]:
        """Return the parameters that learn by how they are to be moved; vectors and scalars are not decayed."""
        learning = list(self.trainable().values())
        matrices = ParameterGroup([p for p in learning if p.ndim >= 2], 1.0, True)
        vectors = ParameterGroup([p for p in learning if p.ndim < 2], 1.0, False)
        return [group for group in (matrices, vectors) if group.parameters]

    def regularizer(self) -> Tensor | None:
        """Return a term the method adds to the loss, or None."""
        return None

    def after_step(self, step: int) -> None:
        """Do what the method does between the optimizer's step (number `step`, from 1) and clearing gradients."""

    def is_final(self, step: int) -> bool:
        """Return whether weights after `step` may be kept as a result."""
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a checkpoint needs to go on: tensors, and values that JSON can hold.

        What is drawn once and never trained (VeRA's matrices, LoRA-FA's A) is not in it: `attach` with the same seed
        draws the same.
        """
        return {name: p.detach().clone() for name, p in self.trainable().items()}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(tensors[name])

    def save(self, folder: Path, base_name: str) -> None:
        """Write the files of the method into `folder`."""

    def summary(self) -> dict[str, Any]:
        """Return what is worth telling of the trained adapter beyond its recipe."""
        return {}


class PeftAdapter(AttachedAdapter):
    """An adapter that PEFT made: what it saves, plain PEFT opens."""

    def __init__(
        self, base: nn.Module, wrapped: Any, *, first_layer: int, max_length: int, encoder: nn.Module | None = None
    ) -> None:
        stored_as = wrapped.peft_config[NAME].peft_type.value.lower()
        inner = wrapped.get_base_model()
        super().__init__(
            base, encoder or wrapped, inner, first_layer=first_layer, max_length=max_length, stored_as=stored_as
        )
        self.wrapped = wrapped

    def save(self, folder: Path, base_name: str) -> None:
        write_peft(folder, self.wrapped.peft_config[NAME], read_peft_state(self.wrapped), base_name)


class ReplacingAdapter(PeftAdapter):
    """An adapter of values that replace or multiply: pulled to zero they would not vanish but do harm."""

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(list(self.trainable().values()), 1.0, False)]


def read_peft_state(wrapped: Any) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's names, each once.

    RandLoRA's layers all hold the random matrices of the model, and PEFT lists them for every layer.
    """
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    distinct: dict[int, str] = {}
    for name in sorted(state, key=len):
        distinct.setdefault(state[name].data_ptr(), name)
    return {name: state[name] for name in sorted(distinct.values())}


def write_peft(folder: Path, config: Any, state: Mapping[str, Tensor], base_name: str) -> None:
    """Write an adapter's tensors and config as PEFT does."""
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    fields = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base_name}
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n")


def find_first_layer(model: nn.Module, top_layers: int | None) -> int:
    """Return the lowest layer an adapter of the top layers touches; 0 where the stack cannot be cut."""
    return first_top_layer(model, top_layers) if find_architecture(model).splittable else 0


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let the module that has the parameter `name` have this one instead."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module `name` is."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def is_quantised(model: nn.Module) -> bool:
    """Return whether any linear weight of `model` is stored in fewer bits than a number has."""
    return any(isinstance(m, nn.Linear) and not m.weight.is_floating_point() for m in model.modules())


# Warning filters belong to the whole process, and two threads would put them back in the wrong order.
_QUIET = threading.Lock()


@contextmanager
def silence_peft() -> Iterator[None]:
    """Silence PEFT's advice, which is for callers who choose names and targets by hand."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
