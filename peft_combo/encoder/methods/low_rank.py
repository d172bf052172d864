"""LoRA with its variants, and AdaLoRA: low-rank updates, and a faster way to compute them.

Every one of them is stored as plain LoRA: PiSSA by subtracting its start, AdaLoRA by folding its singular values in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from peft_combo.encoder.architectures import copy_sharing_weights, find_target_modules
from peft_combo.encoder.methods.attached import (
    NAME,
    ParameterGroup,
    PeftAdapter,
    find_first_layer,
    is_quantised,
    set_parameter,
    write_peft,
)
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import AdaloraAdapter, LoraAdapter


class _LowRankLinear(torch.autograd.Function):
    """``x (W + B A)^T + b`` for a frozen W: one product forward, and backward no gradient of W is ever made.

    The textbook form adds ``B (A x)`` to the frozen layer's output: three more passes over the activations forward and
    four backward. W + B A costs r multiply-adds per weight, once a step. With a frozen A only ``x A^T`` is kept for the
    way back, r numbers a token instead of the layer's width (Zhang et al. 2023, LoRA-FA, section 3).
    """

    @staticmethod
    def forward(context: Any, x: Tensor, whole: Tensor, bias: Tensor | None, right: Tensor, left: Tensor) -> Tensor:
        context.a_learns = context.needs_input_grad[3]
        context.save_for_backward(x if context.a_learns else x @ right.T, whole, right, left)
        return nn.functional.linear(x, whole, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, whole, right, left = context.saved_tensors
        flat, kept = gradient.reshape(-1, gradient.shape[-1]), kept.reshape(-1, kept.shape[-1])
        grad_right = (flat @ left).T @ kept if context.a_learns else None  # (R, T) @ (T, I) -> (R, I)
        grad_left = None
        if context.needs_input_grad[4]:
            grad_left = flat.T @ (kept @ right.T if context.a_learns else kept)  # (O, T) @ (T, R) -> (O, R)
        grad_x = (gradient @ whole) if context.needs_input_grad[0] else None
        return grad_x, None, None, grad_right, grad_left


def _fuse(model: nn.Module) -> None:
    """Let the plain LoRA and AdaLoRA layers of `model` compute in the fused form wherever that is the same thing.

    Their own forward stays in charge of everything else: dropout while training, quantised or half-precision weights.
    """
    for module in model.modules():
        if isinstance(module, lora.Linear | AdaLoraLayer) and type(module.get_base_layer()) is nn.Linear:
            if isinstance(module, lora.Linear) and (module.use_dora.get(NAME) or module.lora_variant):
                continue
            module.forward = functools.partial(_forward_fused, module, module.forward)


def _forward_fused(module: Any, honest: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base: nn.Linear = module.get_base_layer()
    dropout = module.lora_dropout[NAME]
    drops = module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    if args or kwargs or drops or module.merged or module.disable_adapters or x.dtype != base.weight.dtype:
        return honest(x, *args, **kwargs)
    if torch.is_autocast_enabled(x.device.type) or base.weight.dtype != torch.float32:
        return honest(x, *args, **kwargs)
    right, left = module.lora_A[NAME], module.lora_B[NAME]
    sources: tuple[Tensor, ...]
    if isinstance(module, AdaLoraLayer):
        sources = (right, left, module.lora_E[NAME], module.ranknum[NAME])
        right = right * module.lora_E[NAME]
        left = left * (module.scaling[NAME] / (module.ranknum[NAME] + 1e-5))
    else:
        right, left = right.weight, left.weight
        sources = (right, left)
        left = left * module.scaling[NAME]
    whole = _sum_weights(module, base.weight, sources, left, right)
    fused: Tensor = _LowRankLinear.apply(x, whole, base.bias, right, left)  # type: ignore[no-untyped-call]
    return fused


def _sum_weights(module: Any, weight: Tensor, sources: tuple[Tensor, ...], left: Tensor, right: Tensor) -> Tensor:
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


class Lora(PeftAdapter):
    """LoRA (Hu et al. 2021), with the learning rates of LoRA+ where they differ."""

    def __init__(
        self, base: nn.Module, wrapped: Any, *, first_layer: int, max_length: int, plus_ratio: float = 1.0
    ) -> None:
        super().__init__(base, wrapped, first_layer=first_layer, max_length=max_length)
        self._plus_ratio = plus_ratio
        _fuse(self.inner)

    def groups(self) -> list[ParameterGroup]:
        """B by itself where it has a rate of its own (Hayou et al. 2024, LoRA+)."""
        if self._plus_ratio == 1.0:
            return super().groups()
        learning = self.trainable()
        faster = {name: p for name, p in learning.items() if ".lora_B." in name}
        others = [p for name, p in learning.items() if name not in faster]
        groups = [
            ParameterGroup([p for p in others if p.ndim >= 2], 1.0, True),
            ParameterGroup(list(faster.values()), self._plus_ratio, True),
            ParameterGroup([p for p in others if p.ndim < 2], 1.0, False),
        ]
        return [group for group in groups if group.parameters]


class Pissa(Lora):
    """PiSSA (Meng et al. 2024): A and B start as the principal part of W, which is taken out of the frozen W.

    W keeps its copy here, so the encoder others use is never changed, and what is stored is the difference to it.
    """

    def __init__(self, base: nn.Module, wrapped: Any, *, first_layer: int, max_length: int, plus_ratio: float) -> None:
        super().__init__(base, wrapped, first_layer=first_layer, max_length=max_length, plus_ratio=plus_ratio)
        self._start = {name: (a.detach().clone(), b.detach().clone()) for name, a, b in self._factors()}

    def _factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, module in self.inner.named_modules():
            if isinstance(module, lora.Linear):
                yield name, module.lora_A[NAME].weight, module.lora_B[NAME].weight

    def groups(self) -> list[ParameterGroup]:
        """Not decayed: towards zero the principal part of W itself would be lost, and not the update."""
        return [ParameterGroup(group.parameters, group.rate, False) for group in super().groups()]

    def save(self, folder: Path, base_name: str) -> None:
        """Store ``s (B A - B0 A0)`` as plain LoRA of twice the rank: ``[B, B0] [A; -A0]``."""
        state: dict[str, Tensor] = {}
        for name, right, left in self._factors():
            first_right, first_left = self._start[name]
            state[f"base_model.model.{name}.lora_A.weight"] = torch.cat([right.detach(), -first_right])
            state[f"base_model.model.{name}.lora_B.weight"] = torch.cat([left.detach(), first_left], 1)
        config = self.wrapped.peft_config[NAME]
        # Twice the rank must leave the scaling, alpha / rank or alpha / sqrt(rank), what it was.
        alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
        plain = peft.LoraConfig(
            task_type=config.task_type, r=2 * config.r, lora_alpha=alpha, use_rslora=config.use_rslora,
            lora_dropout=config.lora_dropout, target_modules=config.target_modules,
        )  # fmt: skip
        write_peft(folder, plain, state, base_name)


class Adalora(PeftAdapter):
    """AdaLoRA (Zhang et al. 2023): singular values are pruned by importance until a rank budget is met."""

    def __init__(self, base: nn.Module, wrapped: Any, *, first_layer: int, max_length: int, weight: float) -> None:
        super().__init__(base, wrapped, first_layer=first_layer, max_length=max_length)
        self.stored_as = "lora"
        self._orthogonal_weight = weight
        _fuse(self.inner)

    @property
    def _tuner(self) -> Any:
        return self.wrapped.base_model

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[NAME]

    def _modules(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.inner.named_modules():
            if isinstance(module, AdaLoraLayer):
                yield name, module

    def regularizer(self) -> Tensor:
        """The orthogonality term of AdaLoRA's equation 4; PEFT adds it only where a model returns its own loss."""
        terms = []
        for _, module in self._modules():
            right, left = module.lora_A[NAME], module.lora_B[NAME]
            eye = torch.eye(right.shape[0], dtype=right.dtype, device=right.device)
            terms += [torch.linalg.norm(right @ right.T - eye), torch.linalg.norm(left.T @ left - eye)]
        return self._orthogonal_weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        self._tuner.update_and_allocate(step)

    def is_final(self, step: int) -> bool:
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
        device = next(self.inner.parameters()).device  # a checkpoint is read into the CPU's memory
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            prefix, kept = f"allocator.{kind}.", getattr(allocator, kind)
            for name in (name for name in tensors if name.startswith(prefix)):
                kept[name.removeprefix(prefix)] = tensors[name].to(device, copy=True)
        self._config.rank_pattern = values["rank_pattern"]

    def _ranks(self) -> dict[str, int]:
        return {name: int((module.lora_E[NAME] != 0).sum()) for name, module in self._modules()}

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
            kept = module.lora_E[NAME].detach()[:, 0] != 0
            scale = module.scaling[NAME] / (module.ranknum[NAME].detach() + 1e-5)
            right = (module.lora_A[NAME] * module.lora_E[NAME]).detach()[kept]
            left = (module.lora_B[NAME] * scale).detach()[:, kept]
            state[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
        if not ranks:
            raise BackboneError("AdaLoRA pruned every rank. Raise adapter.target_rank or shorten the schedule.")
        widest = max(ranks.values())
        config = peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=widest, lora_alpha=widest, target_modules=sorted(ranks),
            rank_pattern=ranks, alpha_pattern=ranks,  # alpha equal to rank: a scaling of one
        )  # fmt: skip
        write_peft(folder, config, state, base_name)

    def summary(self) -> dict[str, Any]:
        return {"ranks": self._ranks()}


def attach_lora(model: nn.Module, config: LoraAdapter, max_length: int) -> Lora:
    """Put LoRA into a copy of `model`.

    Raises:
        BackboneError: PiSSA over weights that are quantised, or DoRA over 8-bit ones.
    """
    encoder = copy_sharing_weights(model)
    targets = find_target_modules(encoder, config.targets, config.top_layers)
    if config.pissa:
        if is_quantised(model):
            raise BackboneError(
                "adapter.pissa: the singular vectors of quantised weights cannot be had. Set backbone.quantization: "
                "none, or adapter.pissa: false."
            )
        for name in targets:  # PEFT takes the principal part out of the weights themselves
            weight = encoder.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            set_parameter(encoder, f"{name}.weight", nn.Parameter(weight.detach().clone(), requires_grad=False))
    if config.dora and any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        raise BackboneError(
            "adapter.dora: 8bit weights lose their scales when PEFT reads them for DoRA. Set backbone.quantization: "
            "4bit or none, or adapter.dora: false."
        )
    wrapped: Any = peft.get_peft_model(
        encoder,
        peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
            use_rslora=config.rslora, use_dora=config.dora, target_modules=targets,
            # 16 power iterations from a seeded start, as in the paper: the decomposition at a fraction of the time.
            init_lora_weights="pissa_niter_16" if config.pissa else True,
        ),
    )  # fmt: skip
    if config.freeze_a:
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    kind = Pissa if config.pissa else Lora
    first_layer = find_first_layer(encoder, config.top_layers)
    return kind(model, wrapped, first_layer=first_layer, max_length=max_length, plus_ratio=config.plus_ratio)


def attach_adalora(model: nn.Module, config: AdaloraAdapter, max_length: int, total_steps: int) -> Adalora:
    """Put AdaLoRA into a copy of `model`, its schedule laid over `total_steps`.

    Raises:
        BackboneError: the schedule leaves no step to lower the rank in.
    """
    warmup = round(config.warmup_fraction * total_steps)
    final = round(config.final_fraction * total_steps)
    if warmup >= total_steps - final:
        raise BackboneError(
            f"adapter: AdaLoRA needs steps in which to lower the rank; {total_steps} steps leave none between {warmup} "
            f"of warm-up and {final} at the end. Train for more epochs or lower adapter.warmup_fraction and "
            "adapter.final_fraction."
        )
    encoder = copy_sharing_weights(model)
    wrapped = peft.get_peft_model(
        encoder,
        peft.AdaLoraConfig(
            task_type="FEATURE_EXTRACTION", init_r=config.initial_rank, target_r=config.target_rank,
            lora_alpha=config.alpha, lora_dropout=config.dropout, tinit=warmup, tfinal=final,
            deltaT=config.allocate_every, beta1=config.beta1, beta2=config.beta2, total_step=total_steps,
            orth_reg_weight=config.orthogonal_weight,
            target_modules=find_target_modules(encoder, config.targets, config.top_layers),
        ),
    )  # fmt: skip
    first_layer = find_first_layer(encoder, config.top_layers)
    return Adalora(model, wrapped, first_layer=first_layer, max_length=max_length, weight=config.orthogonal_weight)
