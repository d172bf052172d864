"""Vector shards: vectors of more texts than fit into memory, in files of equal rows with a manifest.

Owns the folder and when a shard that is there may be kept. Sees texts in blocks and vectors; knows nothing of where
texts come from, nor who encodes.

    FOLDER/
      shard-00000.npy     (rows, D) float32, the first texts; numpy.load(file, mmap_mode="r") reads it
      shard-00000.json    what is in it: encoder, digest of its texts, digest of the file; written after the file
      manifest.json       all shards; written last, so who sees it sees a whole folder

A shard whose texts and encoder are the same stays, whoever made it and whenever: what was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from peft_combo.distributed import Executor, LostShare, cut_blocks
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.fixed_encoder import FixedEncoder, encode_share, find_encoder
from peft_combo.errors import StoreError
from peft_combo.files import atomic_file, discard, list_names, open_regular

MANIFEST = "manifest.json"
SHARD_ROWS = 32_768
"""Rows of a shard at most: 50 MB at 384 dimensions, and what a worker that dies loses."""

_LIMIT = 2**27  # bytes of a manifest that is read; a billion texts are some ten MB

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(BaseModel):
    """What is in a shard.

    Attributes:
        file: its name. rows: of it. texts_sha256: over the texts' own digests. vectors_sha256: of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5,}\.npy$")]
    rows: Annotated[int, Field(strict=True, ge=1)]
    texts_sha256: Sha256
    vectors_sha256: Sha256
    encoder: dict[str, str | int | None]


class ShardManifest(BaseModel):
    """What is in a folder of shards.

    Attributes:
        adapter: the version that encoded, None for the frozen encoder. encoder: all that vectors depend on, the
            adapter's digest and the backbone's fingerprint among them.
        rows, dim: of the vectors. texts_sha256: over those of the shards. shards: in the order of the texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    adapter: str | None
    encoder: dict[str, str | int | None]
    rows: Annotated[int, Field(strict=True, ge=0)]
    dim: Annotated[int, Field(strict=True, ge=1)]
    texts_sha256: Sha256
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class ShardReport:
    """What an embedding did: shards written now, shards that were there, and the manifest of all."""

    manifest: ShardManifest
    encoded: int  # texts
    kept: int  # texts


class TextBlocks(Protocol):
    """Texts that can be read in blocks, again and again: `data.readers.text_column.TextColumn`, for one."""

    rows: int

    def blocks(self, size: int) -> Iterator[list[str]]:
        """Return the texts in order, `size` at a time."""


def embed_shards(
    bank: AdapterBank,
    texts: TextBlocks,
    reference: str | None,
    folder: Path,
    *,
    executor: Executor | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int], None] | None = None,
) -> ShardReport:
    """Encode texts into a folder of shards: here, or by the workers of an executor.

    Args:
        texts: read block by block; a text costs no memory before its turn.
        reference: an adapter of `bank`; None is the frozen encoder.
        folder: where a part of the shards may be already.
        shard_rows: rows of a shard at most. With workers there are several shards for each.
        progress: told how many texts are done, those that were there included.
    Raises:
        StoreError: the folder holds vectors of another encoder, cannot be written, or workers died of a block.
        DataError: the texts cannot be read. PeftComboError: no worker could be started.
    """
    encoder = find_encoder(bank, reference)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_folder(folder, encoder)
        size = _choose_rows(folder, encoder, texts.rows, executor, shard_rows)
        shards, encoded, lost = _make_shards(encoder, texts, folder, size, executor, progress or (lambda rows: None))
        if lost:
            missing = texts.rows - sum(shard.rows for shard in shards.values())
            raise StoreError(f"{missing:,} texts were not encoded: {lost}. The others are kept; try again.")
        manifest = _seal(folder, encoder, shards)
    except OSError as error:
        raise StoreError(
            f"The vectors in {folder}/ cannot be written: {error.strerror or error}. Free some space, change the "
            "permissions, or name another folder."
        ) from error
    return ShardReport(manifest, encoded, manifest.rows - encoded)


def read_shards(folder: Path) -> ShardManifest:
    """Read what is in a folder of shards.

    Raises:
        StoreError: it is not whole, or no such folder.
    """
    try:
        with open_regular(folder / MANIFEST) as file:
            return ShardManifest.model_validate_json(file.read(_LIMIT))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{folder}/ holds no vectors, or not all of them: its {MANIFEST} cannot be read. Make it, or go on with "
            f"it, by: peft-combo embed --recipe NAME --texts FILE.parquet --to {folder}"
        ) from error


def open_shard(folder: Path, shard: Shard) -> NDArray[np.float32]:
    """Map the vectors of a shard, (rows, D); its digest is compared first.

    Raises:
        StoreError: it is not what was written.
    """
    path = folder / shard.file
    try:
        if _digest_file(path) != shard.vectors_sha256:
            raise ValueError("other bytes")
        vectors: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is missing or not what was written. Delete it and embed again: the others are kept."
        ) from error
    return vectors


# --- making them ------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, encoder: FixedEncoder) -> None:
    """Refuse a folder with vectors of another encoder, which would be mixed or lost."""
    names = list_names(folder)
    if MANIFEST in names:
        there = read_shards(folder)
        found, owner = there.encoder, there.adapter or "the frozen encoder"
    else:
        first = next((shard for name in names if (shard := _read_shard(folder, name)) is not None), None)
        found, owner = (encoder.fields if first is None else first.encoder), "another adapter or encoder"
    if found != encoder.fields:
        raise StoreError(
            f"{folder}/ holds vectors of {owner}, these would be of {encoder.reference or 'the frozen encoder'} on "
            f"{encoder.backbone.name} (digests in its manifests differ). Name another folder, or delete that one."
        )


def _choose_rows(folder: Path, encoder: FixedEncoder, rows: int, executor: Executor | None, most: int) -> int:
    """Return the rows of a shard: those of the first one that is there, or enough shards for the workers."""
    there = _read_shard(folder, "shard-00000.json")
    if there is not None and there.encoder == encoder.fields and there.rows <= most:
        return there.rows
    blocks = cut_blocks(rows, 1 if executor is None else executor.workers, most)
    return blocks[0].stop if blocks and executor is not None else most


def _make_shards(
    encoder: FixedEncoder, texts: TextBlocks, folder: Path, size: int, executor: Executor | None,
    progress: Callable[[int], None],
) -> tuple[dict[int, Shard], int, str]:  # fmt: skip
    """Encode what is missing; return the shards by number, the texts encoded, and why some are lost, if any are."""
    shards: dict[int, Shard] = {}
    asked: list[tuple[int, str]] = []  # number and texts' digest of each share that was handed out

    def choose() -> Iterator[dict[str, Any]]:
        for number, block in enumerate(texts.blocks(size)):
            digest = _digest_texts(block)
            there = _keep(folder, number, digest, len(block), encoder)
            if there is not None:
                shards[number] = there
                progress(len(block))
                continue
            discard(folder / MANIFEST)  # it speaks of shards that will be others
            asked.append((number, digest))
            yield encoder.build_share(block)

    encoded, lost = 0, ""
    results: Iterable[tuple[int, Any]]
    if executor is None:
        results = ((place, encoder.encode(share["texts"])) for place, share in enumerate(choose()))
    else:
        results = executor.map_shares(encode_share, choose())
    for place, vectors in results:
        if isinstance(vectors, LostShare):
            lost = vectors.reason
            continue
        number, digest = asked[place]
        shards[number] = _write(folder, number, digest, encoder, vectors)
        encoded += len(vectors)
        progress(len(vectors))
    return shards, encoded, lost


def _write(folder: Path, number: int, digest: str, encoder: FixedEncoder, vectors: NDArray[np.float32]) -> Shard:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(vectors, "<f4"), allow_pickle=False)
    name = f"shard-{number:05d}"
    shard = Shard(
        file=f"{name}.npy", rows=len(vectors), texts_sha256=digest, encoder=encoder.fields,
        vectors_sha256=hashlib.sha256(content.getbuffer()).hexdigest(),
    )  # fmt: skip
    with atomic_file(folder / shard.file) as file:
        file.write(content.getbuffer())
    with atomic_file(folder / f"{name}.json") as file:
        file.write(shard.model_dump_json(indent=1).encode() + b"\n")
    return shard


def _keep(folder: Path, number: int, digest: str, rows: int, encoder: FixedEncoder) -> Shard | None:
    """Return a shard that is there, of these texts by this encoder, and whole."""
    shard = _read_shard(folder, f"shard-{number:05d}.json")
    if shard is None or (shard.texts_sha256, shard.rows, shard.encoder) != (digest, rows, encoder.fields):
        return None
    try:
        return shard if _digest_file(folder / shard.file) == shard.vectors_sha256 else None
    except OSError:
        return None


def _seal(folder: Path, encoder: FixedEncoder, shards: dict[int, Shard]) -> ShardManifest:
    """Write the manifest of all, and drop what an earlier, longer run left behind it."""
    ordered = tuple(shards[number] for number in sorted(shards))
    known = {shard.file for shard in ordered}
    for name in list_names(folder):
        if name.startswith("shard-") and name.endswith((".npy", ".json")) and f"{Path(name).stem}.npy" not in known:
            discard(folder / name)
    manifest = ShardManifest(
        adapter=encoder.reference, encoder=encoder.fields, rows=sum(shard.rows for shard in ordered), dim=encoder.dim,
        texts_sha256=hashlib.sha256("".join(shard.texts_sha256 for shard in ordered).encode()).hexdigest(),
        shards=ordered,
    )  # fmt: skip
    with atomic_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode() + b"\n")
    return manifest


def _read_shard(folder: Path, name: str) -> Shard | None:
    if not (name.startswith("shard-") and name.endswith(".json")):
        return None
    with suppress(OSError, ValueError), open_regular(folder / name) as file:
        return Shard.model_validate_json(file.read(2**16))
    return None


def _digest_texts(texts: list[str]) -> str:
    each = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts)
    return hashlib.sha256(b"".join(each)).hexdigest()


def _digest_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
