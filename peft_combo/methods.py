"""Adapter methods: how each is put into an encoder, trained, checkpointed, saved and loaded.

Owns everything that differs between LoRA, AdaLoRA, prefix tuning and the baselines that train weights or nothing, and
is the only module that imports peft. Each adapter sits in an encoder copy of its own that shares the frozen weights
(`architectures.sharing_copy`), so there is no active adapter to set, and nothing one adapter does reaches another.
Knows nothing of texts, tasks, stores or the training loop.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, assert_never

# bitsandbytes, which peft imports, warns on processors for which it looks for faster 4-bit kernels on a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import peft
import torch
from peft.tuners import lora
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_combo.architectures import (
    architecture_of,
    layers_of,
    model_type,
    sharing_copy,
    target_modules,
    usable_positions,
)
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe import (
    AdaloraAdapter,
    AdapterConfig,
    FullTuning,
    HeadOnly,
    LoraAdapter,
    PrefixAdapter,
    TopLayers,
)

CONFIG_FILE = "adapter_config.json"  # PEFT's own names, so that plain PEFT opens the folder
WEIGHTS_FILE = "adapter_model.safetensors"
TUNED_WEIGHTS_FILE = "tuned_weights.safetensors"  # methods that are no PEFT adapter: the changed weights themselves

# Each encoder copy holds one adapter, so PEFT's internal name never matters; "default" makes PEFT save flat files.
_NAME = "default"


class _LowRankLinear(torch.autograd.Function):
    """``x (W + B A)^T + b`` for a frozen W: one product forward, and backward no gradient of W is ever made.

    The textbook form adds ``B (A x)`` to the frozen layer's output: three more passes over the activations forward and
    four backward. W + B A costs r multiply-adds per weight, once a step.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, whole: Tensor, bias: Tensor | None, right: Tensor, left: Tensor) -> Tensor:
        context.save_for_backward(x, whole, right, left)
        return nn.functional.linear(x, whole, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, right, left = context.saved_tensors
        flat, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        through = flat @ left  # (T, O) @ (O, R) -> (T, R)
        grad_right = through.T @ inputs  # (R, T) @ (T, I) -> (R, I)
        grad_left = (flat.T @ (inputs @ right.T)) if context.needs_input_grad[4] else None  # (O, T) @ (T, R) -> (O, R)
        grad_x = (flat @ whole).view_as(x) if context.needs_input_grad[0] else None
        return grad_x, None, None, grad_right, grad_left


def fuse_low_rank(model: nn.Module) -> None:
    """Let the plain LoRA and AdaLoRA layers of `model` compute in the fused form wherever that is the same thing.

    Their own forward stays in charge of everything else: dropout while training, quantised or half-precision weights.
    """
    for module in model.modules():
        if isinstance(module, lora.Linear | AdaLoraLayer) and type(module.get_base_layer()) is nn.Linear:
            if isinstance(module, lora.Linear) and (module.use_dora.get(_NAME) or module.lora_variant):
                continue
            module.forward = functools.partial(_fused_forward, module, module.forward)


def _fused_forward(module: Any, honest: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base: nn.Linear = module.get_base_layer()
    dropout = module.lora_dropout[_NAME]
    drops = module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    if args or kwargs or drops or module.merged or module.disable_adapters or x.dtype != base.weight.dtype:
        return honest(x, *args, **kwargs)
    if torch.is_autocast_enabled(x.device.type) or base.weight.dtype != torch.float32:
        return honest(x, *args, **kwargs)
    right, left = module.lora_A[_NAME], module.lora_B[_NAME]
    sources: tuple[Tensor, ...]
    if isinstance(module, AdaLoraLayer):
        sources = (right, left, module.lora_E[_NAME], module.ranknum[_NAME])
        right = right * module.lora_E[_NAME]
        left = left * (module.scaling[_NAME] / (module.ranknum[_NAME] + 1e-5))
    else:
        right, left = right.weight, left.weight
        sources = (right, left)
        left = left * module.scaling[_NAME]
    whole = _whole(module, base.weight, sources, left, right)
    fused: Tensor = _LowRankLinear.apply(x, whole, base.bias, right, left)  # type: ignore[no-untyped-call]
    return fused


def _whole(module: Any, weight: Tensor, sources: tuple[Tensor, ...], left: Tensor, right: Tensor) -> Tensor:
    """Return W + B A; while training it is kept until the optimizer changes one of `sources`.

    Without gradients nothing is kept: an adapter that serves costs its own size and not that of the layers it sits on.
    """
    if not torch.is_grad_enabled():
        return torch.addmm(weight, left, right)  # (O, I) + (O, R) @ (R, I)
    state = tuple((source.data_ptr(), source._version) for source in sources)
    kept = module.__dict__.get("_kept_whole")
    if kept is None or kept[0] != state:
        with torch.no_grad():
            kept = (state, torch.addmm(weight, left, right))
        module.__dict__["_kept_whole"] = kept
    whole: Tensor = kept[1]
    return whole


class AttachedAdapter:
    """An adapter inside an encoder copy; this class serves LoRA and whatever needs no special care.

    Attributes:
        encoder: call it with ``input_ids`` and ``attention_mask`` (B, L); returns ``last_hidden_state`` (B, L, D).
        inner: the transformers model inside `encoder`, the injected modules in place.
        cut: index of the lowest layer that the adapter touches; what is below is the same as in the frozen encoder.
        max_length: the most tokens a text may have.
        stored_as: what the saved files are: a PEFT type, ``weights`` or ``head``.
    """

    def __init__(self, encoder: nn.Module, inner: nn.Module, cut: int, max_length: int, stored_as: str) -> None:
        self.encoder = encoder
        self.inner = inner
        self.cut = cut
        self.max_length = max_length
        self.stored_as = stored_as
        fuse_low_rank(inner)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name."""
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def regularizer(self) -> Tensor | None:
        """Return a term the method adds to the loss, or None."""
        return None

    def after_step(self, step: int) -> None:
        """Do what the method does between the optimizer's step (number `step`, from 1) and clearing gradients."""

    def settled(self, step: int) -> bool:
        """Return whether weights after `step` may be kept as a result."""
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a checkpoint needs to go on: tensors, and values that JSON can hold."""
        return {name: p.detach().clone() for name, p in self.trainable().items()}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.trainable().items():
                parameter.copy_(tensors[name])

    def save(self, folder: Path, base_name: str) -> None:
        """Write the files of the method into `folder`."""
        assert isinstance(self.encoder, peft.PeftModel)
        state = peft.get_peft_model_state_dict(self.encoder, save_embedding_layers=False)
        _write_peft(folder, self.encoder.peft_config[_NAME], state, base_name)

    def summary(self) -> dict[str, Any]:
        """Return what is worth telling of the trained adapter beyond its recipe."""
        return {}


class _AdaLora(AttachedAdapter):
    """AdaLoRA (Zhang et al. 2023): singular values are pruned by importance until a rank budget is met."""

    def __init__(self, encoder: nn.Module, inner: nn.Module, cut: int, max_length: int, weight: float) -> None:
        super().__init__(encoder, inner, cut, max_length, "lora")
        self._orthogonal_weight = weight

    @property
    def _tuner(self) -> Any:
        return self.encoder.base_model

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[_NAME]

    def _modules(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.inner.named_modules():
            if isinstance(module, AdaLoraLayer):
                yield name, module

    def regularizer(self) -> Tensor:
        """The orthogonality term of AdaLoRA's equation 4; PEFT adds it only where a model returns its own loss."""
        terms = []
        for _, module in self._modules():
            right, left = module.lora_A[_NAME], module.lora_B[_NAME]
            eye = torch.eye(right.shape[0], dtype=right.dtype, device=right.device)
            terms += [torch.linalg.norm(right @ right.T - eye), torch.linalg.norm(left.T @ left - eye)]
        return self._orthogonal_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        self._tuner.update_and_allocate(step)

    def settled(self, step: int) -> bool:
        """Only once the budget is met: stopping or picking a best step earlier would keep ranks near the initial."""
        return bool(step >= self._config.total_step - self._config.tfinal)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state()
        allocator = self._tuner.rankallocator
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            tensors |= {f"allocator.{kind}.{name}": t.detach().clone() for name, t in getattr(allocator, kind).items()}
        return tensors, {**values, "rank_pattern": self._config.rank_pattern}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().load_state(tensors, values)
        allocator = self._tuner.rankallocator
        allocator.reset_ipt()
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            prefix = f"allocator.{kind}."
            getattr(allocator, kind).update(
                {name.removeprefix(prefix): t.clone() for name, t in tensors.items() if name.startswith(prefix)}
            )
        self._config.rank_pattern = values["rank_pattern"]

    def _ranks(self) -> dict[str, int]:
        return {name: int((module.lora_E[_NAME] != 0).sum()) for name, module in self._modules()}

    def save(self, folder: Path, base_name: str) -> None:
        """Fold singular values and scaling into plain LoRA, exactly, and drop what was pruned.

        ``B (A E) s / (n + 1e-5)`` becomes ``B' A'`` with ``A' = E A`` and ``B' = B s / (n + 1e-5)``: any LoRA runtime
        can serve it, and PEFT cannot reload a pruned AdaLoRA for training anyway.
        """
        state: dict[str, Tensor] = {}
        ranks = {name: rank for name, rank in self._ranks().items() if rank > 0}
        for name, module in self._modules():
            if name not in ranks:
                continue
            kept = module.lora_E[_NAME].detach()[:, 0] != 0
            scale = module.scaling[_NAME] / (module.ranknum[_NAME].detach() + 1e-5)
            right = (module.lora_A[_NAME] * module.lora_E[_NAME]).detach()[kept]
            left = (module.lora_B[_NAME] * scale).detach()[:, kept]
            state[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
        if not ranks:
            raise BackboneError("AdaLoRA pruned every rank. Raise adapter.target_rank or shorten the schedule.")
        widest = max(ranks.values())
        config = peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=widest, lora_alpha=widest, target_modules=sorted(ranks),
            rank_pattern=ranks, alpha_pattern=ranks,  # alpha equal to rank: a scaling of one
        )  # fmt: skip
        _write_peft(folder, config, state, base_name)

    def summary(self) -> dict[str, Any]:
        return {"ranks": self._ranks()}


class _Prefix(AttachedAdapter):
    """Prefix tuning (Li and Liang 2021): trained keys and values in front of every layer's own."""

    def __init__(self, encoder: nn.Module, inner: nn.Module, max_length: int) -> None:
        # Virtual tokens take positions, so every layer sees another input than in the frozen encoder: nothing to cache.
        super().__init__(encoder, inner, 0, max_length, "prefix_tuning")


class _Weights(AttachedAdapter):
    """No adapter in PEFT's sense: some of the encoder's own weights learn, or none (the task's head alone)."""

    def save(self, folder: Path, base_name: str) -> None:
        tuned = {name: p.detach().contiguous() for name, p in self.trainable().items()}
        if tuned:
            save_file(tuned, folder / TUNED_WEIGHTS_FILE, metadata={"format": "pt"})


def attach(model: nn.Module, config: AdapterConfig, *, max_length: int, total_steps: int, seed: int) -> AttachedAdapter:
    """Put a new, untrained adapter into a copy of `model` that shares its weights.

    Args:
        model: a frozen encoder; left as it is.
        max_length: the backbone's cap on tokens; prefix tuning lowers it where virtual tokens need the positions.
        total_steps: optimizer steps of the run; AdaLoRA's schedule is laid over them.
        seed: for the initial weights.
    Raises:
        BackboneError: the method does not work on this architecture, or its schedule does not fit the steps.
    """
    encoder = sharing_copy(model)
    depth = len(layers_of(encoder))
    with torch.random.fork_rng(devices=[]), _peft_quiet():
        torch.manual_seed(seed)
        match config:
            case LoraAdapter():
                low_rank = peft.LoraConfig(
                    task_type="FEATURE_EXTRACTION", r=config.rank, lora_alpha=config.alpha,
                    lora_dropout=config.dropout, use_rslora=config.rslora,
                    target_modules=target_modules(encoder, config.targets, config.top_layers),
                )  # fmt: skip
                wrapped = peft.get_peft_model(encoder, low_rank)
                return AttachedAdapter(wrapped, encoder, _cut(encoder, config.top_layers), max_length, "lora")
            case AdaloraAdapter():
                warmup = round(config.warmup_fraction * total_steps)
                final = round(config.final_fraction * total_steps)
                if warmup >= total_steps - final:
                    raise BackboneError(
                        f"adapter: AdaLoRA needs steps in which to lower the rank; {total_steps} steps leave none "
                        f"between {warmup} of warm-up and {final} at the end. Train for more epochs or lower "
                        "adapter.warmup_fraction and adapter.final_fraction."
                    )
                adalora = peft.AdaLoraConfig(
                    task_type="FEATURE_EXTRACTION", init_r=config.initial_rank, target_r=config.target_rank,
                    lora_alpha=config.alpha, lora_dropout=config.dropout, tinit=warmup, tfinal=final,
                    deltaT=config.allocate_every, beta1=config.beta1, beta2=config.beta2, total_step=total_steps,
                    orth_reg_weight=config.orthogonal_weight,
                    target_modules=target_modules(encoder, config.targets, config.top_layers),
                )  # fmt: skip
                wrapped = peft.get_peft_model(encoder, adalora)
                cut = _cut(encoder, config.top_layers)
                return _AdaLora(wrapped, encoder, cut, max_length, config.orthogonal_weight)
            case PrefixAdapter():
                if not architecture_of(encoder).prefix:
                    raise BackboneError(
                        f'adapter.method: "prefix" does not work on {model_type(encoder)}: its attention takes no '
                        "outside keys and values, so the prefix would be ignored. Use lora or adalora."
                    )
                prefix = peft.PrefixTuningConfig(
                    task_type="FEATURE_EXTRACTION", num_virtual_tokens=config.length,
                    prefix_projection=config.projection, encoder_hidden_size=config.projection_size,
                )  # fmt: skip
                wrapped = peft.get_peft_model(encoder, prefix)
                return _Prefix(wrapped, encoder, _prefix_length(encoder, config.length, max_length))
            case TopLayers():
                if config.layers > depth:
                    raise BackboneError(f"adapter.layers: expected at most {depth}, found {config.layers}.")
                _own_weights(encoder, f"{architecture_of(encoder).layers}.", depth - config.layers)
                return _Weights(encoder, encoder, _cut(encoder, config.layers), max_length, "weights")
            case FullTuning():
                _own_weights(encoder, "", 0)
                return _Weights(encoder, encoder, 0, max_length, "weights")
            case HeadOnly():
                return _Weights(encoder, encoder, depth, max_length, "head")
            case _:
                assert_never(config)


def load(model: nn.Module, folder: Path, stored_as: str, max_length: int) -> AttachedAdapter:
    """Put a saved adapter into a copy of `model` that shares its weights, ready to encode.

    Args:
        folder: holds the files that `AttachedAdapter.save` wrote, or those of a plain PEFT adapter.
        stored_as: what the manifest says the files are.
    Raises:
        StoreError: the files do not fit the encoder.
    """
    encoder = sharing_copy(model)
    depth = len(layers_of(encoder))
    if stored_as == "head":
        return _Weights(encoder, encoder, depth, max_length, stored_as)
    try:
        if stored_as == "weights":
            tuned = load_file(folder / TUNED_WEIGHTS_FILE)
            parameters = dict(encoder.named_parameters())
            for name, tensor in tuned.items():
                if name not in parameters or parameters[name].shape != tensor.shape:
                    raise StoreError(f"{folder / TUNED_WEIGHTS_FILE}: {name} does not fit the encoder.")
                _set_parameter(encoder, name, nn.Parameter(tensor, requires_grad=False))
            return _Weights(encoder, encoder, 0, max_length, stored_as)
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            written = set(file.keys())
        with _peft_quiet():
            wrapped = peft.PeftModel.from_pretrained(encoder, str(folder), is_trainable=False)
        # PEFT drops tensors it finds no place for and only warns of those it misses.
        wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        if written != wanted:
            raise ValueError(f"its tensors are not those the encoder takes, for example {min(written ^ wanted)}")
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"The adapter in {folder} does not fit the encoder: {reason}") from error
    wrapped.eval().requires_grad_(False)
    config = wrapped.peft_config[_NAME]
    if stored_as == "prefix_tuning":
        return _Prefix(wrapped, encoder, _prefix_length(encoder, config.num_virtual_tokens, max_length))
    return AttachedAdapter(wrapped, encoder, 0, max_length, stored_as)


def _write_peft(folder: Path, config: Any, state: Mapping[str, Tensor], base_name: str) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    fields = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base_name}
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n")


def _cut(model: nn.Module, top_layers: int | None) -> int:
    if top_layers is None or not architecture_of(model).splittable:
        return 0
    return len(layers_of(model)) - top_layers


def _prefix_length(model: nn.Module, virtual_tokens: int, max_length: int) -> int:
    """Virtual tokens take the first positions, so a text has that many fewer."""
    positions = usable_positions(model)
    room = positions - virtual_tokens
    if room < 8:
        raise BackboneError(
            f"adapter.length: {virtual_tokens} virtual tokens leave {room} of the encoder's {positions} positions for "
            "text. Use a shorter prefix."
        )
    return min(max_length, room)


def _own_weights(model: nn.Module, prefix: str, first_layer: int) -> None:
    """Give `model` trainable copies of its own of the weights under `prefix` from layer `first_layer` on."""
    for name, parameter in list(model.named_parameters()):
        if name.startswith(prefix) and (not prefix or int(name.removeprefix(prefix).split(".")[0]) >= first_layer):
            if not parameter.is_floating_point():
                raise BackboneError(
                    "adapter.method: weights that are quantised cannot be trained. Set backbone.quantization: none, "
                    "or use lora."
                )
            _set_parameter(model, name, nn.Parameter(parameter.detach().clone(), requires_grad=True))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


# Warning filters belong to the whole process, and two threads would put them back in the wrong order.
_QUIET = threading.Lock()


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """Silence PEFT's advice, which is for callers who choose names and targets by hand."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
