"""Sharded index: one over vectors in several mapped files, itself kept in files; searched part by part, merged exactly.

    index/
      shard-00000.faiss  ...    FAISS's own form, mapped as it is searched; an exact index has none
      index.json                the manifest, written last

Owns how an index is built in bounded memory, kept and checked. Nothing is unpickled: FAISS reads a file only after its
sha256 was that of the manifest. Knows nothing of texts, adapters or items.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_combo.encoder.index.approximate import FaissIndex, FaissMissing, add_rows, choose_effort, import_faiss, train
from peft_combo.encoder.index.choose import IndexKind, choose_kind
from peft_combo.encoder.index.exact import (
    ExactIndex,
    Excluded,
    Found,
    Index,
    check_queries,
    check_vectors,
    divide_pairs,
    merge_results,
    pad_found,
    slices,
)
from peft_combo.encoder.vectors import BLOCK_ROWS
from peft_combo.errors import StoreError
from peft_combo.files import open_regular, stage_folder

ShardedKind: TypeAlias = Literal["exact", "hnsw", "ivf-sq8", "ivfpq"]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_MANIFEST = "index.json"
_MANIFEST_LIMIT = 2**24  # bytes; a shard takes some 300
_SAMPLE_ROWS = 600_000  # what a sample for training may take of memory: 0.9 GB at 384 dimensions


class _Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: Annotated[int, Field(ge=1)]
    vectors_sha256: Digest
    file: Annotated[str, Field(pattern=r"^shard-[0-9]{5}\.faiss$")] | None
    file_sha256: Digest | None


class IndexManifest(BaseModel):
    """What `index.json` says.

    Attributes:
        source: who made the vectors, as the builder named it: the key of an adapter. lists: inverted lists, 0 for none.
        shards: of each its rows, the digest of its vectors (little-endian float32) and of its file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: ShardedKind
    dim: Annotated[int, Field(ge=1)]
    source: str
    lists: Annotated[int, Field(ge=0)]
    shards: tuple[_Shard, ...]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)


def build_index(
    folder: str | Path, vectors: Sequence[NDArray[np.float32]], kind: IndexKind = "auto", *, source: str = "",
    progress: Callable[[int], None] | None = None,
) -> IndexManifest:  # fmt: skip
    """Build an index over shards of vectors and keep it in a folder, which appears whole or not at all.

    Inverted lists are learned once, from a sample of all shards, and shared: such an index finds what one over all rows
    would find. A block of vectors and one shard's codes (D + 8 bytes a row for ``ivf-sq8``) are in memory at a time.

    Args:
        vectors: shards, each (N_s, D) float32 and not empty; mapped files will do.
        kind: ``auto`` takes that of `choose_kind` for all rows.
        source: who made the vectors; `ShardedIndex.open` can ask for it.
        progress: told how many rows were added.
    Raises:
        ValueError: there is no shard, one is empty, or they differ in width.
        PeftComboError: faiss is needed and not installed.
        StoreError: the folder cannot be written.
    """
    shards = [check_vectors(own) for own in vectors]
    if not shards or not all(len(own) for own in shards) or len({own.shape[1] for own in shards}) != 1:
        raise ValueError(f"vectors: expected shards of rows, equally wide, found {[own.shape for own in shards]}.")
    rows = sum(map(len, shards))
    kind = choose_kind(rows) if kind == "auto" else kind
    trained = None if kind == "exact" or kind == "hnsw" else train(_take_sample(shards), kind, rows=rows)
    described = []
    try:
        with stage_folder(Path(folder), replace=True) as staged:
            for number, own in enumerate(shards):
                name = None if kind == "exact" else f"shard-{number:05d}.faiss"
                digest = _write_shard(own, kind, trained, None if name is None else staged.path / name, progress)
                described.append(
                    _Shard(rows=len(own), vectors_sha256=_digest_vectors(own), file=name, file_sha256=digest)
                )
            lists = 0 if trained is None else int(trained.nlist)
            manifest = IndexManifest(
                kind=kind, dim=shards[0].shape[1], source=source, lists=lists, shards=tuple(described)
            )
            staged.manifest = (_MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode() + b"\n")
    except OSError as error:
        raise StoreError(
            f"The index in {folder}/ cannot be written: {error}. Free the disk, or name another."
        ) from error
    return manifest


class ShardedIndex:
    """An index over shards, searched part by part and merged: highest score first, of equal ones the lower row.

    Of kind ``exact`` it finds row for row and score for score what `ExactIndex` finds over all rows. A shard whose file
    is missing or is not what was written is left out, with a warning, and `missing` says so; its rows are not found.

    Attributes:
        manifest: of the folder. missing: numbers of the shards that are left out.
    """

    def __init__(
        self, manifest: IndexManifest, parts: Sequence[Index | None], starts: NDArray[np.int64], threads: int
    ) -> None:
        self.manifest = manifest
        self.missing = tuple(number for number, part in enumerate(parts) if part is None)
        self._parts = [(part, int(start)) for part, start in zip(parts, starts, strict=True) if part is not None]
        self._threads = threads

    @classmethod
    def open(
        cls, folder: str | Path, vectors: Sequence[NDArray[np.float32] | None], *, source: str | None = None,
        effort: int | None = None, threads: int = 1, check_vectors: bool = True,
    ) -> ShardedIndex:  # fmt: skip
        """Open the index of a folder over the vectors it was built of.

        Args:
            vectors: the shards as they were given to `build_index`; None for one that is not there.
            source: who is to have made the vectors; None takes any.
            effort: see `FaissIndex`.
            threads: shards searched at a time.
            check_vectors: whether to compare the vectors' digests too, which reads them once.
        Raises:
            StoreError: there is no such index, it is of another source or other vectors, or no shard is whole.
            PeftComboError: faiss is needed and not installed.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if source is not None and source != manifest.source:
            raise StoreError(f"The index in {folder}/ is of {manifest.source!r}, expected {source!r}. Build it again.")
        sizes = [shard.rows for shard in manifest.shards]
        found = [None if own is None else own.shape for own in vectors]
        if len(found) != len(sizes) or any(
            own is not None and own != (size, manifest.dim) for own, size in zip(found, sizes, strict=True)
        ):
            expected = [(size, manifest.dim) for size in sizes]
            raise StoreError(f"The index in {folder}/ is of shards {expected}, found {found}. Build it again.")
        parts: list[Index | None] = []
        for number, (shard, own) in enumerate(zip(manifest.shards, vectors, strict=True)):
            part, why = None, "its vectors are missing"
            if own is not None:
                part, why = _open_shard(folder, manifest.kind, shard, own, effort, check_vectors)
            if part is None:
                warnings.warn(
                    f"Shard {number} of the index in {folder}/ is left out: {why}. {shard.rows} of {manifest.rows} "
                    "rows cannot be found. Build the index again.",
                    stacklevel=2,
                )
            parts.append(part)
        if not any(part is not None for part in parts):
            raise StoreError(f"No shard of the index in {folder}/ is whole. Build it again.")
        return cls(manifest, parts, np.cumsum([0, *sizes[:-1]]), threads)

    @property
    def degraded(self) -> bool:
        """Whether shards are left out, so that some rows cannot be found."""
        return bool(self.missing)

    def __len__(self) -> int:
        return self.manifest.rows

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        excluded: Excluded | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """See `Index.search`; rows are numbered through all shards, those left out included."""
        queries, pairs = check_queries((len(self), self.manifest.dim), queries, k, excluded, allowed)
        barred = divide_pairs(pairs, len(queries))

        def search(part: Index, start: int) -> Found:
            own = None if excluded is None else [rows - start for rows in barred]
            rows, scores = part.search(queries, k, own, None if allowed is None else allowed[start : start + len(part)])
            return np.where(rows >= 0, rows + start, -1), scores

        if self._threads > 1 and len(self._parts) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                found = list(pool.map(lambda one: search(*one), self._parts))
        else:
            found = [search(part, start) for part, start in self._parts]
        return pad_found(merge_results(found, k), min(k, len(self)))


def _take_sample(shards: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return all rows where they are few, else some of each shard, in proportion."""
    share = min(1.0, _SAMPLE_ROWS / sum(map(len, shards)))
    dice = np.random.default_rng(0)
    taken = [own[np.sort(dice.permutation(len(own))[: max(1, int(len(own) * share))])] for own in shards]
    return np.concatenate(taken)


def _write_shard(
    vectors: NDArray[np.float32], kind: ShardedKind, trained: Any, path: Path | None,
    progress: Callable[[int], None] | None,
) -> str | None:  # fmt: skip
    """Write the index of one shard; return the sha256 of its file, None where it needs none."""
    if path is None or kind == "exact":
        if progress is not None:
            progress(len(vectors))
        return None
    faiss = import_faiss()
    index = train(vectors, kind) if trained is None else faiss.clone_index(trained)
    for block in slices(len(vectors), BLOCK_ROWS):
        add_rows(index, vectors[block])
        if progress is not None:
            progress(block.stop - block.start)
    faiss.write_index(index, str(path))
    return _digest_file(path)


def _open_shard(
    folder: Path, kind: ShardedKind, shard: _Shard, vectors: NDArray[np.float32], effort: int | None, check: bool
) -> tuple[Index | None, str]:
    """Return a shard's index, or None and why not."""
    if check and _digest_vectors(vectors) != shard.vectors_sha256:
        return None, "its vectors are not those it was built of"
    if kind == "exact":
        return ExactIndex(vectors), ""
    assert shard.file is not None
    path = folder / shard.file
    try:
        if _digest_file(path) != shard.file_sha256:
            return None, f"{shard.file} is not what was written"
        faiss = import_faiss()
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        if kind != "hnsw":
            # Lists of a mapped file are read ahead by 32 threads, started for each query: ten times what it takes.
            faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    except FaissMissing:
        raise
    except (OSError, RuntimeError) as error:  # faiss raises RuntimeError for all it cannot read
        return None, f"{shard.file} cannot be read ({error})"
    lists = 0 if kind == "hnsw" else int(index.nlist)
    if index.ntotal != shard.rows or index.d != vectors.shape[1]:
        return None, f"{shard.file} holds {index.ntotal} rows of {index.d} numbers"
    return FaissIndex(vectors, kind, effort or choose_effort(kind, lists), built=index), ""


def _read_manifest(folder: Path) -> IndexManifest:
    try:
        with open_regular(folder / _MANIFEST) as file:
            manifest = IndexManifest.model_validate_json(file.read(_MANIFEST_LIMIT))
    except FileNotFoundError as cause:
        raise StoreError(
            f"There is no index in {folder}/: expected {_MANIFEST}. Build one with build_index."
        ) from cause
    except ValidationError as cause:
        fault = cause.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise StoreError(f"{folder / _MANIFEST}: {where}: {fault['msg']}. Build it again.") from cause
    except OSError as cause:
        raise StoreError(f"{folder / _MANIFEST} cannot be read: {cause}. Build it again.") from cause
    needs = manifest.kind != "exact"
    if not manifest.shards or any((one.file and one.file_sha256) is None for one in manifest.shards if needs):
        raise StoreError(f"{folder / _MANIFEST} names no file for a shard. Build the index again.")
    return manifest


def _digest_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_vectors(vectors: NDArray[np.float32]) -> str:
    digest = hashlib.sha256()
    for block in slices(len(vectors), BLOCK_ROWS):
        digest.update(np.ascontiguousarray(vectors[block], "<f4").data)
    return digest.hexdigest()
