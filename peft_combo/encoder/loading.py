"""Loading of a base model into memory: config, tokenizer and weights, none of which may be made up on the way.

Owns what is compared before an encoder is handed out: tensors with those the encoder has, tokens with its embeddings;
and 8-bit and 4-bit quantization. Custom code is never run. Knows nothing of how texts become vectors.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peft_combo.encoder.architectures import count_usable_positions
from peft_combo.encoder.base_folder import BaseFolder, refuse_base
from peft_combo.errors import BackboneError, shorten

Quantization = Literal["none", "8bit", "4bit"]

# Files of old hold constants that are made anew today.
_CONSTANTS = ("position_ids", "token_type_ids", "inv_freq")
# A tokenizer of fewer words than this share of the embeddings is hardly the model's; embeddings are padded to a round
# number, which is some per cent.
_FEWEST_WORDS = 0.8
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def check_length(max_length: int, encoder: nn.Module, name: str) -> None:
    """Refuse more tokens than the encoder has positions."""
    room = count_usable_positions(encoder)
    if max_length > room:
        raise BackboneError(f"backbone.max_length: expected at most {room} for {name}, found {max_length}.")


class FewWords:
    """A tokenizer whose ids are folded into a small vocabulary: as many tokens, other words."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self.pad_token_id = int(tokenizer.pad_token_id or 0) % size

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[Any]]]:
        encoded = dict(self._tokenizer(texts, **options))
        return encoded | {"input_ids": [[token % self._size for token in ids] for ids in encoded["input_ids"]]}

    def get_vocab(self) -> dict[str, int]:
        return {word: number % self._size for word, number in self._tokenizer.get_vocab().items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def load_config(base: BaseFolder) -> Any:
    """Read the config of an encoder.

    Raises:
        BackboneError: transformers cannot make one of it.
    """
    from transformers import AutoConfig

    with silence_loading():
        try:
            return AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # ValueError, KeyError, TypeError, or what checks the fields of a config
            raise refuse_base(
                base.name, "config.json", f"transformers does not take it ({explain(error)}).",
                "Copy it again from the model the weights come from.",
            ) from error  # fmt: skip


def load_tokenizer(base: BaseFolder, embeddings: int) -> Any:
    """Read the tokenizer of an encoder, and hold it against the embeddings.

    Args:
        embeddings: how many tokens the encoder has an embedding of.
    Raises:
        BackboneError: it cannot be read, knows no word, or knows tokens that have no embedding.
    """
    from transformers import AutoTokenizer

    with silence_loading():
        try:
            tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # tokenizers raises plain Exception, transformers whatever a file makes it do
            where, problem, remedy = _explain_tokenizer(base.path, error)
            raise refuse_base(base.name, where, problem, remedy) from error
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary.keys() - set(tokenizer.all_special_tokens):
        raise refuse_base(
            base.name, "", f"its tokenizer knows no word: {len(vocabulary)} special tokens are all it has.",
            "Copy tokenizer.json (or vocab.txt) from the model the weights come from.",
        )  # fmt: skip
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[last] >= embeddings:
        count = vocabulary[last] + 1
        raise refuse_base(
            base.name, "", f"its tokenizer knows {count:,} tokens (the last: {shorten(last, 40)}), the model has "
            f"{embeddings:,} embeddings.", f"Resize it, model.resize_token_embeddings({count}) and save_pretrained(), "
            "or take the tokenizer it was made with.",
        )  # fmt: skip
    return tokenizer


def _explain_tokenizer(folder: Path, error: Exception) -> tuple[str, str, str]:
    """Return place, problem and remedy of a tokenizer that cannot be read."""
    from importlib.metadata import version

    import tokenizers

    copy = "Copy the tokenizer's files again from the model the weights come from."
    file = folder / "tokenizer.json"
    if not file.is_file():
        return "tokenizer", f"cannot be read ({explain(error)}).", f"{copy} A tokenizer.json is read by itself."
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as damage:
        return file.name, f"is not JSON ({explain(damage)}): cut short or damaged.", copy
    try:
        tokenizers.Tokenizer.from_file(str(file))
    except Exception as reason:  # the only kind tokenizers raises
        return (
            file.name, f"holds what tokenizers {version('tokenizers')} does not know ({explain(reason)}); a newer one "
            "may have written it.", "Upgrade: pip install --upgrade tokenizers transformers; or save it with this one.",
        )  # fmt: skip
    return "tokenizer_config.json", f"transformers does not take it ({explain(error)}).", copy


def build_encoder(config: Any) -> nn.Module:
    """Build the bare encoder a config describes, with random weights, as `load_encoder` would."""
    from transformers import AutoModel

    options = {"dtype": torch.float32, "trust_remote_code": False}
    with silence_loading():
        try:
            model: nn.Module = AutoModel.from_config(config, add_pooling_layer=False, **options)
        except TypeError:
            model = AutoModel.from_config(config, **options)
    return model


def build_shapes(base: BaseFolder, config: Any) -> nn.Module:
    """Build the encoder of a base out of shapes alone (device ``meta``).

    Raises:
        BackboneError: the config does not hold together.
    """
    try:
        with torch.device("meta"):
            return build_encoder(config)
    except Exception as error:  # ValueError, TypeError, ZeroDivisionError ...: a width that heads do not divide
        raise refuse_base(
            base.name, "config.json", f"no encoder can be made of it ({explain(error)}).",
            "Copy it again from the model the weights come from.",
        ) from error  # fmt: skip


def find_prefix(base: BaseFolder, shapes: nn.Module) -> str:
    """Return what stands before the encoder's own names in the file, as ``_orig_mod.bert.``; mostly nothing.

    Args:
        shapes: the encoder that the config describes.
    Raises:
        BackboneError: a tensor of the encoder is missing or of another shape, so that it would be random, or layers are
            left over that the config does not have.
    """
    stored = {_rename_old(name): info.shape for name, info in base.tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.state_dict().items()}
    prefixes = _list_prefixes(stored, expected)
    native = ("", f"{getattr(shapes, 'base_model_prefix', '')}.")
    ranked = sorted(prefixes, key=lambda p: (-sum(p + own in stored for own in expected), p not in native, len(p), p))
    prefix = ranked[0] if ranked else ""
    whole = [one for one in ranked if all(one + own in stored for own in expected)]
    if len(whole) > 1 and prefix not in native:
        raise refuse_base(
            base.name, "", f'its weights hold {len(whole)} encoders, named "{whole[0]}..." and "{whole[1]}...".',
            "Save the one that is meant by itself: model.save_pretrained(FOLDER)",
        )  # fmt: skip
    _check_tensors(base, stored, expected, prefix, {name for name, _ in shapes.named_children()})
    return prefix


def _list_prefixes(stored: Iterable[str], expected: Iterable[str]) -> set[str]:
    """Return whatever stands before an expected name in a stored one."""
    by_end: dict[str, list[str]] = {}
    for own in expected:
        by_end.setdefault(own.rpartition(".")[2], []).append(own)
    return {
        name.removesuffix(own)
        for name in stored
        for own in by_end.get(name.rpartition(".")[2], ())
        if name == own or name.endswith(f".{own}")
    }


def _rename_old(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = name.replace(old, new)
    return name


def _check_tensors(
    base: BaseFolder, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], prefix: str,
    parts: set[str],
) -> None:  # fmt: skip
    """Refuse what would leave a tensor random, or a layer of the file unused.

    Args:
        parts: of the encoder; what is left over outside of them is a pooler's or a task head's.
    """
    missing = [own for own in expected if prefix + own not in stored]
    odd = [own for own in expected if stored.get(prefix + own, expected[own]) != expected[own]]
    left = [
        name
        for name in (name.removeprefix(prefix) for name in stored if name.startswith(prefix))
        if name not in expected and name.partition(".")[0] in parts and not name.endswith(_CONSTANTS)
    ]
    adapted = any(".lora_" in name or ".base_layer." in name for name in stored)
    merge = "Merge the adapter that is in them: model.merge_and_unload().save_pretrained(FOLDER)"
    if odd:
        problem = (
            f"speaks of another encoder than the weights hold: {odd[0]} is {expected[odd[0]]} by the config and "
            f"{stored[prefix + odd[0]]} in the file; tensors of another shape: {len(odd)}."
        )
        raise refuse_base(base.name, "config.json", problem, "Take both files from the same model.")
    if missing:
        others = left or [name for name in stored if name.removeprefix(prefix) not in expected and "pooler" not in name]
        found = f"; found instead: {', '.join(map(shorten, others[:2]))}{_count_more(others, 2)}" if others else ""
        problem = (
            f"the weights lack {len(missing)} of the encoder's {len(expected)} tensors ({missing[0]}"
            f"{_count_more(missing)}), which would be random{found}."
        )
        remedy = "Save the whole encoder without a wrapper: model.save_pretrained(FOLDER)"
        if not others:
            remedy = "Take config.json and weights from the same model."
        raise refuse_base(base.name, "", problem, merge if adapted else remedy)
    if left and adapted:
        problem = f"the weights hold an adapter that would not be used ({shorten(left[0])}{_count_more(left)})."
        raise refuse_base(base.name, "", problem, merge)
    if left:
        problem = (
            f"describes fewer or other layers than the weights hold: {shorten(left[0])}{_count_more(left)} would not "
            "be used."
        )
        raise refuse_base(base.name, "config.json", problem, "Take both files from the same model.")


def _count_more(names: Sequence[str], told: int = 1) -> str:
    return f" and {len(names) - told:,} more" if len(names) > told else ""


def load_encoder(base: BaseFolder, prefix: str, **options: Any) -> nn.Module:
    """Load the bare encoder, in float32 unless told otherwise, from safetensors only, without an unused pooler.

    Args:
        prefix: what `find_prefix` returned.
        options: of transformers' from_pretrained.
    Raises:
        BackboneError: a file cannot be read after all, a tensor was made up, or one is not finite.
    """
    from transformers import AutoModel

    # What has the names of transformers is left to it; it drops its own prefix by itself.
    mapping = {f"^{re.escape(prefix)}": ""} if prefix else None
    options = {
        "use_safetensors": True, "dtype": torch.float32, "trust_remote_code": False, "local_files_only": True,
        "output_loading_info": True, "key_mapping": mapping, **options,
    }  # fmt: skip
    with silence_loading():
        try:
            try:
                model, report = AutoModel.from_pretrained(base.path, add_pooling_layer=False, **options)
            except TypeError:  # DistilBERT, ELECTRA and ModernBERT never had one
                model, report = AutoModel.from_pretrained(base.path, **options)
        except Exception as error:  # the headers were read before; whatever is left, a disk's or a device's
            raise refuse_base(
                base.name, "", f"transformers cannot load its weights ({explain(error)}).",
                "Copy the base again, or save it again with save_pretrained().",
            ) from error  # fmt: skip
    random = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    if random:
        raise refuse_base(
            base.name, "", f"{len(random)} tensors would be random ({shorten(str(random[0]))}).",
            "Save the whole encoder without a wrapper: model.save_pretrained(FOLDER)",
        )  # fmt: skip
    loaded: nn.Module = model
    return loaded


def find_doubts(base: BaseFolder, encoder: nn.Module, tokenizer: Any) -> list[str]:
    """Say what fits and yet hardly belongs together, a sentence each."""
    import transformers

    found = []
    embedding: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    words = len(set(tokenizer.get_vocab().values()))
    if words < _FEWEST_WORDS * embedding.num_embeddings:
        found.append(
            f"The tokenizer of {base.name} knows {words:,} tokens, the model has {embedding.num_embeddings:,} "
            "embeddings: is it the model's own?"
        )
    kind, classes = base.config["model_type"], base.config.get("architectures")
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    other = getattr(getattr(getattr(transformers, named, None), "config_class", None), "model_type", kind)
    if other != kind:
        found.append(
            f"config.json of {base.name} has the model_type {kind}, and {named} is a {other}: it is read as {kind}."
        )
    if base.sentence.lower_case and tokenizer(["Ab"])["input_ids"] != tokenizer(["ab"])["input_ids"]:
        found.append(f"{base.name} says that it reads texts in lower case, and its tokenizer keeps capitals.")
    return found


def check_finite(encoder: nn.Module, name: str) -> None:
    """Refuse weights of which one is not a number: no vector would be."""
    for place, tensor in encoder.named_parameters():
        if not torch.isfinite(tensor).all():
            raise refuse_base(
                name, "", f"its weights hold values that are not finite, as in {place}.",
                "Take an earlier checkpoint, or one that was not saved in half precision.",
            )  # fmt: skip


def choose_device() -> torch.device:
    """Return where an encoder computes unless it is told: on the GPU where there is one, else on the CPU.

    ``CUDA_VISIBLE_DEVICES=`` (empty) hides the GPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def count_gpus() -> int:
    """Return how many GPUs this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def load_quantized(base: BaseFolder, prefix: str, quantization: Quantization, device: str | torch.device) -> nn.Module:
    """Load the encoder in 8 or 4 bits.

    Raises:
        BackboneError: bitsandbytes does not take it.
    """
    from transformers import BitsAndBytesConfig

    # At every product of every layer it says that float32 inputs are cast to float16; the plan names the precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    # One device and never "auto": each process of a distributed run holds its whole copy.
    place = {"": device}
    try:
        model = load_encoder(base, prefix, quantization_config=config, device_map=place)
        for module in model.modules():
            # On processors with AVX512-BF16 a 4-bit layer repacks its weights at its first evaluation, for good, and
            # no gradient passes through the packed form; these weights serve evaluation and training in turn.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (mypy takes modules for closed)
        return model
    except (ImportError, RuntimeError, ValueError, BackboneError) as error:
        raise BackboneError(
            f"The encoder {base.name} cannot be loaded in {quantization}: {explain(error.__cause__ or error)}. "
            "Use backbone.quantization: none, or check the bitsandbytes installation."
        ) from error


def explain(error: BaseException) -> str:
    """Return the first line of what another package raised, fit for a message."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__, 160).rstrip(".: ")


@contextmanager
def silence_loading() -> Iterator[None]:
    """Keep transformers from reporting what is looked at here anyway, and from drawing bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
