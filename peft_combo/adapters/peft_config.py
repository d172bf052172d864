"""Configuration of a PEFT adapter from elsewhere: what of it is believed, and what it becomes here.

Owns the fields of every method that are read, their bounds, and where in the encoder a tensor belongs. A configuration
is written anew from what is known here: it may name modules to import, repositories to load and regular expressions to
run, and nothing of that is followed. Knows nothing of files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_combo.encoder.architectures import find_architecture
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError, Fault, did_you_mean, shorten
from peft_combo.recipe.adapter import LoraAdapter, PrefixAdapter
from peft_combo.recipe.fields import format_value

Shapes = Mapping[str, tuple[int, ...]]
Number = int | float

PROMPT_TENSOR = "prompt_embeddings"
_INSIDE = "base_model.model."
_LITERAL = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_NO_HEAD = (None, "FEATURE_EXTRACTION")

# What says nothing about the vectors of a finished adapter: how it was trained, who wrote it, and where it sits, which
# the names of its tensors say better.
_NO_MATTER = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "runtime_config", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "ensure_weight_tying", "init_weights", "bias",
}  # fmt: skip
_NO_MATTER_LORA = {
    "lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size",
}  # fmt: skip
_READ_LORA = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
}  # fmt: skip
_SCHEDULE_ADALORA = {
    "r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "use_rslora", "init_lora_weights",
}  # fmt: skip
_SHAPE_PROMPT = {
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type",
}  # fmt: skip
# Ways to start a LoRA that leave the frozen weights as they are; the others count on weights that were changed.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class _Update:
    """A method whose tensors sit at modules: the ends of their names, those all modules share, and what is read.

    Attributes:
        numbers: fields and the most they may be. flags: fields that are true or false.
        ignored: fields of the training alone.
    """

    method: str
    ends: str
    shared: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


_UPDATES: dict[str, _Update] = {
    "IA3": _Update("ia3", r"ia3_l", ignored=("feedforward_modules", "init_ia3_weights")),
    "VERA": _Update(
        "vera", r"vera_lambda_[bd]", ("vera_A", "vera_B"), {"r": 4096, "projection_prng_key": 2**63, "d_initial": 10},
        ("save_projection",), ("vera_dropout",),
    ),
    "LOHA": _Update(
        "loha", r"hada_w[12]_[ab]", numbers={"r": 1024, "alpha": 4096}, ignored=("rank_dropout", "module_dropout"),
    ),
    "LOKR": _Update(
        "lokr", r"lokr_w[12](_[ab])?", numbers={"r": 1024, "alpha": 4096, "decompose_factor": 4096},
        flags=("decompose_both",), ignored=("rank_dropout", "module_dropout"),
    ),
    "RANDLORA": _Update(
        "randlora", r"randlora_(lambda|gamma)", ("randlora_A", "randlora_B"),
        {"r": 1024, "projection_prng_key": 2**63, "randlora_alpha": 65_536},
        ("save_projection", "sparse", "very_sparse"), ("randlora_dropout",),
    ),
    "OFT": _Update(
        "oft", r"oft_R\.weight", numbers={"r": 4096, "oft_block_size": 1024, "eps": 1, "num_cayley_neumann_terms": 100},
        flags=("use_cayley_neumann", "block_share", "coft"), ignored=("module_dropout",),
    ),
    "MISS": _Update("miss", r"miss_block", numbers={"r": 1024, "mini_r": 4096}, ignored=("miss_dropout",)),
    "HIRA": _Update("hira", r"hira_[AB]", numbers={"r": 1024}, ignored=("hira_dropout",)),
    "SHIRA": _Update(
        "shira", r"shira_(weight|indices)", numbers={"r": 4096, "random_seed": 2**63}, ignored=("mask_type",),
    ),
    "C3A": _Update("c3a", r"c3a_kernel", numbers={"block_size": 4096}, ignored=("block_size_pattern",)),
    "LILY": _Update(
        "lily", r"lily_(A|B|router)\.weight", numbers={"r": 1024, "stride_A": 1024, "num_B": 64, "scaling": 4096},
    ),
    "LN_TUNING": _Update("layer-norm", r"ln_tuning_layers\.(?:weight|bias)"),
    "TRAINABLE_TOKENS": _Update("tokens", r"trainable_tokens_delta", ignored=("token_indices",)),
}  # fmt: skip
_PATTERNS = {
    "LOHA": ("rank_pattern", "alpha_pattern"), "LOKR": ("rank_pattern", "alpha_pattern"), "HIRA": ("rank_pattern",),
}  # fmt: skip
_PROMPTS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning"}
PEFT_TYPES = ("LORA", "ADALORA", *_PROMPTS, *_UPDATES)


@dataclass(frozen=True)
class Believed:
    """What a configuration becomes here.

    Attributes:
        method: as a recipe names it. stored_as: a PEFT type in lower case.
        config: content of the new `adapter_config.json`.
        names: tensors that are taken, by their name in the file: their name here.
        left_out: names in the file of a task head.
        fold: rank scales of AdaLoRA by module, to be folded into plain LoRA; empty for every other method.
    """

    method: str
    stored_as: str
    config: dict[str, Any]
    names: dict[str, str]
    left_out: tuple[str, ...] = ()
    fold: Mapping[str, float] = field(default_factory=dict)


def believe(config: Mapping[str, Any], shapes: Shapes, backbone: Backbone, faults: list[Fault]) -> Believed | None:
    """Write the configuration of an adapter anew; None, and `faults`, where it cannot be.

    Args:
        shapes: of its tensors, by name. A tensor of a task head is left out, where there is an adapter beside it.
    Raises:
        BackboneError: a prefix does not work on the encoder.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        found = "nothing" if kind is None else format_value(kind)
        hint = did_you_mean(kind, PEFT_TYPES) if isinstance(kind, str) else ""
        faults.append(Fault("peft_type", f"expected one of {', '.join(PEFT_TYPES)}, found {found}.", hint))
        return None
    if kind in _PROMPTS:
        believed = _rewrite_prompt(kind, config, shapes, backbone, faults)
    else:
        place = _Place.find(config, shapes, backbone)
        if kind == "LORA":
            believed = _rewrite_lora(config, shapes, backbone, place, faults)
        elif kind == "ADALORA":
            believed = _rewrite_adalora(config, shapes, backbone, place, faults)
        else:
            believed = _rewrite_update(kind, config, shapes, backbone, place, faults)
    return None if faults else believed


# --- where a tensor belongs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the encoder is inside what was tuned: what stands before its names, and which names are a head's.

    Attributes:
        prefix: of the encoder's modules, as ``bert.`` in a model with a head.
        saved: modules that were trained whole, beside the adapter.
    """

    prefix: str
    parts: frozenset[str]
    saved: tuple[str, ...]
    headed: bool

    @classmethod
    def find(cls, config: Mapping[str, Any], shapes: Shapes, backbone: Backbone) -> _Place:
        """Look for the encoder's stack of layers, or its embeddings, in the names of the tensors."""
        architecture = find_architecture(backbone.model)
        ways = "|".join(re.escape(path) for path in (architecture.layers, architecture.embeddings))
        known = re.compile(rf"{re.escape(_INSIDE)}((?:[^.]+\.){{0,4}}?)(?:{ways})\.")
        before = Counter(match[1] for name in shapes if (match := known.match(name)))
        saved = config.get("modules_to_save")
        return cls(
            before.most_common(1)[0][0] if before else "",
            frozenset(name for name, _ in backbone.model.named_children()),
            tuple(str(one) for one in saved) if isinstance(saved, list) else (),
            config.get("task_type") not in _NO_HEAD,
        )

    def locate(self, name: str) -> str | None:
        """Return the name of a tensor inside the encoder, None where it is not in it."""
        rest = name.removeprefix(_INSIDE).removeprefix(self.prefix)
        inside = name.startswith(_INSIDE + self.prefix) and rest.partition(".")[0] in self.parts
        return rest if inside else None

    def is_head(self, name: str) -> bool:
        """Return whether a tensor belongs to what stands on the encoder, which is not taken over."""
        if not name.startswith(_INSIDE) or self.locate(name) is not None:
            return False
        parts = name.removeprefix(_INSIDE).removeprefix(self.prefix).split(".")
        return self.headed or "pooler" in parts or any(one in parts for one in self.saved)

    def strip(self, module: str) -> str:
        return module.removeprefix(self.prefix)


def _explain_stray(name: str, place: _Place, what: str) -> Fault:
    """Return the fault of a tensor that is none of the method's."""
    inside = place.locate(name)
    if inside is not None and any(one in inside.split(".") for one in place.saved):
        problem = f"holds {shorten(inside)}: weights of the encoder that were trained too, which no adapter holds."
        return Fault("modules_to_save", problem, "Merge it with PEFT, and give the result as backbone.model.")
    return Fault(shorten(name), f"is not a tensor of {what}.")


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _rewrite_lora(
    config: Mapping[str, Any], shapes: Shapes, backbone: Backbone, place: _Place, faults: list[Fault]
) -> Believed:
    """Rewrite a LoRA; where it sits and its ranks come from its tensors."""
    _refuse_unknown(config, _NO_MATTER_LORA | _READ_LORA, faults)
    rank = _read_number(config, "r", LoraAdapter, "rank", faults)
    alpha = _read_number(config, "lora_alpha", LoraAdapter, "alpha", faults)
    ranks, alphas = (_read_pattern(config, name, place, faults) for name in ("rank_pattern", "alpha_pattern"))
    faults += [
        Fault(name, f"expected true or false, found {format_value(config[name])}.")
        for name in ("use_rslora", "use_dora")
        if not isinstance(config.get(name, False), bool)
    ]
    start = config.get("init_lora_weights")
    if start is not None and not isinstance(start, bool) and start not in _PLAIN_STARTS:
        problem = f"{format_value(start)} changes the frozen weights too, and these files do not hold them."
        remedy = "Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        faults.append(Fault("init_lora_weights", problem, remedy))
    modules: dict[str, int] = {}
    names: dict[str, str] = {}
    ends = r"(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
    for name, module, part in _sort_tensors(shapes, ends, "LoRA on a linear layer", place, names, faults):
        width = _read_linear_size(backbone, module)
        if width is None:
            faults.append(Fault(shorten(name), f"{backbone.name} has no linear layer {shorten(module)}."))
            continue
        inputs, outputs = width
        wanted = _look_up_value(ranks, module, rank)
        expected = {"lora_A": (wanted, inputs), "lora_B": (outputs, wanted)}.get(part, (outputs,))
        if shapes[name] != expected:
            faults.append(Fault(shorten(name), f"expected the shape {expected}, found {shapes[name]}."))
        modules[module] = int(wanted)
    written = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "bias": "none", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(modules), "rank_pattern": modules,
        "alpha_pattern": {module: _look_up_value(alphas, module, alpha) for module in modules},
        "use_rslora": config.get("use_rslora") is True, "use_dora": config.get("use_dora") is True,
    }  # fmt: skip
    method = "dora" if written["use_dora"] else "lora"
    return Believed(method, "lora", written, names, _list_head(shapes, place))


def _rewrite_adalora(
    config: Mapping[str, Any], shapes: Shapes, backbone: Backbone, place: _Place, faults: list[Fault]
) -> Believed:
    """Rewrite an AdaLoRA as the plain LoRA it equals: B (E A) s / (n + 1e-5), as PEFT computes it.

    n is the rank at the start, which PEFT keeps when it prunes.
    """
    _refuse_unknown(config, _NO_MATTER_LORA | _SCHEDULE_ADALORA | {"lora_alpha", "rank_pattern"}, faults)
    alpha = _read_number(config, "lora_alpha", LoraAdapter, "alpha", faults)
    initial = _read_number(config, "init_r", LoraAdapter, "rank", faults)
    names: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for name, module, part in _sort_tensors(
        shapes, r"(lora_A|lora_B|lora_E)", "AdaLoRA on a linear layer", place, names, faults
    ):
        width = _read_linear_size(backbone, module)
        if width is None:
            faults.append(Fault(shorten(name), f"{backbone.name} has no linear layer {shorten(module)}."))
            continue
        right = shapes.get(name.removesuffix(part) + "lora_A", (0,))
        rank = right[0] if right else 0
        expected = {"lora_A": (rank, width[0]), "lora_B": (width[1], rank), "lora_E": (rank, 1)}[part]
        if shapes[name] != expected:
            faults.append(Fault(shorten(name), f"expected the shape {expected}, found {shapes[name]}."))
        if rank:
            ranks[module] = rank
        else:
            names.pop(name)
    taken = set(names.values())
    faults += [
        Fault(shorten(module), "expected lora_A, lora_B and lora_E, found fewer.")
        for module in ranks
        if not {f"{_INSIDE}{module}.lora_{part}" for part in "ABE"} <= taken
    ]
    if not ranks and not faults:
        faults.append(Fault("rank_pattern", "every rank was pruned: there is nothing to import."))
    widest = max(ranks.values(), default=1)
    written = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "bias": "none", "r": widest, "lora_alpha": widest,
        "target_modules": sorted(ranks), "rank_pattern": ranks, "alpha_pattern": ranks,
    }  # fmt: skip
    if widest > initial:
        faults.append(Fault("init_r", f"expected at least {widest}, a rank in the file, found {initial}."))
    fold = dict.fromkeys(ranks, alpha / (initial + 1e-5))
    return Believed("adalora", "lora", written, names, _list_head(shapes, place), fold)


def _sort_tensors(
    shapes: Shapes, ends: str, what: str, place: _Place, names: dict[str, str], faults: list[Fault]
) -> Iterable[tuple[str, str, str]]:
    """Return name, module and last part of every tensor of the method; fill `names`, or `faults` for any other."""
    pattern = re.compile(rf"(.+)\.{ends}")
    found = []
    for name in shapes:
        if place.is_head(name):
            continue
        inside = place.locate(name)
        match = pattern.fullmatch(inside if inside is not None else name.removeprefix(_INSIDE))
        if match is None or not name.startswith(_INSIDE) or (inside is not None and _is_saved(inside, place)):
            faults.append(_explain_stray(name, place, what))
            continue
        names[name] = f"{_INSIDE}{match[0]}"
        found.append((name, match[1], match[2]))
    if not found and not faults:
        faults.append(Fault("adapter_model.safetensors", f"holds no tensors of {what}."))
    return found


def _is_saved(inside: str, place: _Place) -> bool:
    return any(one in inside.split(".") for one in place.saved)


def _list_head(shapes: Shapes, place: _Place) -> tuple[str, ...]:
    return tuple(name for name in shapes if place.is_head(name))


# --- other methods ----------------------------------------------------------------------------------------------------


def _rewrite_update(
    kind: str, config: Mapping[str, Any], shapes: Shapes, backbone: Backbone, place: _Place, faults: list[Fault]
) -> Believed:
    """Rewrite a method whose tensors sit at modules; loading then holds names and shapes against the encoder's."""
    update = _UPDATES[kind]
    patterns = set(_PATTERNS.get(kind, ()))
    _refuse_unknown(config, {*update.numbers, *update.flags, *update.ignored, *patterns}, faults)
    written: dict[str, Any] = {"peft_type": kind, "task_type": "FEATURE_EXTRACTION"}
    for name, most in update.numbers.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= most:
            faults.append(Fault(name, f"expected a number from 0 to {most}, found {format_value(value)}."))
        written[name] = value
    for name in update.flags:
        value = config.get(name, False)
        if not isinstance(value, bool):
            faults.append(Fault(name, f"expected true or false, found {format_value(value)}."))
        elif name in config:
            written[name] = value
    names = {f"base_model.{one}": f"base_model.{one}" for one in update.shared if f"base_model.{one}" in shapes}
    repeated = re.compile(rf"{re.escape(_INSIDE)}.*\.({'|'.join(update.shared) or 'none'})")
    own = {n: s for n, s in shapes.items() if n not in names and not (names and repeated.fullmatch(n))}
    modules: dict[str, None] = {}
    for name, module, _ in _sort_tensors(own, f"({update.ends})", f"{kind} inside the encoder", place, names, faults):
        try:
            backbone.model.get_submodule(module)
        except AttributeError:
            faults.append(Fault(shorten(name), f"{backbone.name} has no module {shorten(module)}."))
        modules[module] = None
    written["target_modules"] = sorted(modules)
    for name in sorted(patterns):
        values = _read_pattern(config, name, place, faults)
        default = config.get("r" if name == "rank_pattern" else "alpha", 1)
        written[name] = {module: _look_up_value(values, module, default) for module in modules} if values else {}
    if kind == "IA3":
        ends = [place.strip(one) for one in config.get("feedforward_modules") or () if isinstance(one, str)]
        written["feedforward_modules"] = sorted(m for m in modules if any(f".{m}".endswith(f".{one}") for one in ends))
    if kind == "MISS" and not isinstance(config.get("init_weights", True), bool):
        problem = f"{format_value(config['init_weights'])} computes otherwise than MiSS does, and is not known here."
        faults.append(Fault("init_weights", problem, "Merge it with PEFT, and give the result as backbone.model."))
    if kind == "TRAINABLE_TOKENS":
        written["token_indices"] = _read_token_indices(config, backbone, faults)
    return Believed(update.method, kind.lower(), written, names, _list_head(own, place))


def _read_token_indices(config: Mapping[str, Any], backbone: Backbone, faults: list[Fault]) -> list[int]:
    indices = config.get("token_indices")
    size = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    if isinstance(indices, list) and all(type(one) is int and 0 <= one < size for one in indices):
        return indices
    faults.append(Fault("token_indices", f"expected a list of numbers below {size}, found {format_value(indices)}."))
    return []


def _rewrite_prompt(
    kind: str, config: Mapping[str, Any], shapes: Shapes, backbone: Backbone, faults: list[Fault]
) -> Believed:
    """Rewrite a prefix or a prompt; its shape is the encoder's."""
    _refuse_unknown(config, _SHAPE_PROMPT | {"num_virtual_tokens"}, faults)
    length = _read_number(config, "num_virtual_tokens", PrefixAdapter, "length", faults)
    sizes: Any = backbone.model.config
    width = int(backbone.model.get_input_embeddings().embedding_dim)  # type: ignore[operator]
    if kind == "PREFIX_TUNING":
        if not find_architecture(backbone.model).prefix:
            raise BackboneError(
                f"A prefix does not work on {backbone.model_type}: its attention takes no outside keys."
            )
        width = backbone.dim
    expected = (length, 2 * backbone.layers * width if kind == "PREFIX_TUNING" else width)
    headed = config.get("task_type") not in _NO_HEAD
    left = tuple(name for name in shapes if headed and name != PROMPT_TENSOR and name.startswith("base_model."))
    if {name: shape for name, shape in shapes.items() if name not in left} != {PROMPT_TENSOR: expected}:
        found = ", ".join(f"{shorten(name)} {shape}" for name, shape in list(shapes.items())[:3]) or "no tensors"
        problem = f"expected {PROMPT_TENSOR} {expected} for {backbone.name}, found {found}."
        faults.append(Fault("adapter_model.safetensors", problem))
    written = {
        "peft_type": kind, "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": length, "token_dim": width,
        "num_layers": backbone.layers, "num_transformer_submodules": 1,
        "num_attention_heads": int(sizes.num_attention_heads),
    }  # fmt: skip
    if kind == "PREFIX_TUNING":
        written["prefix_projection"] = False  # what is saved is what the projection made
    return Believed(_PROMPTS[kind], kind.lower(), written, {PROMPT_TENSOR: PROMPT_TENSOR}, left)


# --- fields -----------------------------------------------------------------------------------------------------------


def _refuse_unknown(config: Mapping[str, Any], known: set[str], faults: list[Fault]) -> None:
    """A field that is not known here must not say anything, for it may change what the adapter computes."""
    if config.get("bias", "none") != "none":
        faults.append(Fault("bias", "expected none: biases that were trained too are not an adapter's."))
    for name, value in config.items():
        if name not in known | _NO_MATTER and value not in (None, False, [], {}):
            faults.append(Fault(shorten(name), f"is not known here, and says {format_value(value)}."))


def _read_number(config: Mapping[str, Any], name: str, section: Any, field: str, faults: list[Fault]) -> Number:
    """Return a number that a recipe could have asked for as well."""
    value = config.get(name)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        return getattr(section(**{field: value}), field)  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        bounds = section.model_json_schema()["properties"][field]
        low = bounds.get("minimum", bounds.get("exclusiveMinimum"))
        faults.append(Fault(name, f"expected a number from {low} to {bounds['maximum']}, found {format_value(value)}."))
        return 1


def _read_pattern(config: Mapping[str, Any], name: str, place: _Place, faults: list[Fault]) -> dict[str, Number]:
    """Return the numbers of single modules, by the end of their names; PEFT would take these for expressions."""
    values = config.get(name) or {}
    if not isinstance(values, dict):
        faults.append(Fault(name, f"expected numbers by module, found {format_value(values)}."))
        return {}
    found = {}
    for key, value in values.items():
        where = f"{name}.{shorten(key)}"
        if not _LITERAL.fullmatch(key):
            faults.append(Fault(where, "expected the name of a module; expressions are not run."))
            continue
        wanted = "rank" if name == "rank_pattern" else "alpha"
        found[place.strip(key)] = _read_number({where: value}, where, LoraAdapter, wanted, faults)
    return found


def _look_up_value(values: Mapping[str, Number], module: str, default: Number) -> Number:
    return next((value for key, value in values.items() if f".{module}".endswith(f".{key}")), default)


def _read_linear_size(backbone: Backbone, module: str) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear layer of the encoder, None where there is none of that name."""
    try:
        found = backbone.model.get_submodule(module)
    except AttributeError:
        return None
    inputs, outputs = getattr(found, "in_features", None), getattr(found, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None
