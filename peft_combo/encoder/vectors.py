"""Vector cache: vectors of texts and pictures, encoded once per adapter and kept on disk.

Owns the cache (which texts are known under which adapter, and whether its files are still what was written) and the
division of a catalogue over processes. Sees texts, vectors and row numbers; knows nothing of catalogues, heads or
scores.

    cache/
      <who encodes>/<which texts>/vectors.f32  texts.sha256  manifest.json
      <who encodes>/.draft-*                   being written; nobody reads it

Both names are sha256 digests: of the adapter and the backbone's settings, and of `texts.sha256`. So a folder is never
changed, only replaced, and a file that was mapped yesterday still says what it said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from peft_combo.distributed import Executor, LostShare, cut_blocks
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.fixed_encoder import FixedEncoder, encode_share, find_encoder
from peft_combo.errors import StoreError
from peft_combo.files import DRAFT, TRASH, discard, measure_size, move_aside, stage_folder

_VECTORS, _TEXTS, _MANIFEST = "vectors.f32", "texts.sha256", "manifest.json"
_MANIFEST_LIMIT = 2**16  # bytes; a real one has some 500
_NAME = re.compile(r"[0-9a-f]{64}")
_ABANDONED = 24 * 3600.0  # seconds after which a draft has no writer any more
_DIGEST = 32  # bytes of a sha256

BLOCK_ROWS = 32_768
"""Texts encoded, and rows copied, at a time: 50 MB of vectors at 384 dimensions, whatever the size of the catalogue."""

# Others may replace a folder between our writing and our opening it; so often in a row they do not.
_ATTEMPTS = 5
_POLL_SECONDS = 0.2

Progress = Callable[[int], None]


class Encoder(Protocol):
    """Who encodes: `fields` is all that vectors depend on, `key` its digest; `encode` gives B rows of width `dim`."""

    @property
    def fields(self) -> dict[str, str | int | None]: ...
    @property
    def key(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def encode(self, contents: Sequence[Any], progress: Progress | None = None, /) -> NDArray[np.float32]: ...


# --- the cache --------------------------------------------------------------------------------------------------------


class VectorCache:
    """Vectors of texts, each encoded once per adapter: ``VectorCache("cache").vectors(bank, texts, "fashion")``.

    Any number of threads and processes may share a folder. What is damaged is encoded again; nothing is unpickled.

    Args:
        block_rows: texts encoded, and rows copied, at a time.
    """

    def __init__(self, folder: str | Path, *, block_rows: int = BLOCK_ROWS) -> None:
        self.folder = Path(folder)
        self._block_rows = block_rows
        # Files whose bytes this process has compared with their digest; a changed file has another stamp.
        self._verified: set[tuple[int, ...]] = set()

    def key(self, bank: AdapterBank, reference: str | None) -> str:
        """Return the name under which vectors of an adapter are kept; None is the frozen encoder.

        Raises:
            StoreError: the adapter cannot be had.
        """
        return find_encoder(bank, reference).key

    def missing(self, bank: AdapterBank, texts: Sequence[str], reference: str | None) -> int:
        """Return how many distinct texts `vectors` would have to encode.

        Raises:
            StoreError: the adapter cannot be had, or the folder not be read.
        """
        encoder = find_encoder(bank, reference)
        with _explain_disk_errors(self.folder):
            return len(_find_unknown(_digest_texts(texts), self._list_entries(encoder)))

    def vectors(
        self, bank: AdapterBank, texts: Sequence[str], reference: str | None, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Return the vectors of `texts`, encoding only those that are new under this adapter.

        Args:
            texts: N texts, in the catalogue's order.
            reference: an adapter of `bank`; None is the frozen encoder.
            progress: called with the number of texts encoded since the last call; `missing` tells how many there are.
        Returns:
            (N, D) float32, read-only, rows of unit length: the mapped file where it has these texts in this order, as
            after every encoding; otherwise gathered into memory.
        Raises:
            StoreError: the adapter cannot be had, or the folder not be read or written.
        """
        return self._serve(find_encoder(bank, reference), texts, _digest_texts(texts), progress)

    def pictures(
        self, encoder: Encoder, contents: Sequence[bytes], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Return the vectors of pictures, encoding only those whose bytes are new to this encoder.

        Args:
            encoder: `pixels.AdaptedPictures`. contents: N pictures.
        Returns:
            (N, D) float32, read-only; as of `vectors` the mapped file or gathered into memory.
        Raises:
            StoreError: the folder cannot be read or written. DataError: a picture cannot be decoded.
        """
        return self._serve(encoder, contents, [hashlib.sha256(content).digest() for content in contents], progress)

    def _serve(
        self, encoder: Encoder, texts: Sequence[Any], digests: Sequence[bytes], progress: Progress | None
    ) -> NDArray[np.float32]:
        if not digests:
            return _make_read_only(np.empty((0, encoder.dim), np.float32))
        with _explain_disk_errors(self.folder):
            for _ in range(_ATTEMPTS):
                same = self._open(encoder, _name_shelf(digests))
                if same is not None:
                    return same.vectors
                entries = self._list_entries(encoder)
                if not _find_unknown(digests, entries):
                    return _make_read_only(
                        _gather(*_find_places(digests, entries), [entry.vectors for entry in entries])
                    )
                self._write(encoder, texts, digests, entries, progress)
        raise StoreError(f"The vectors in {self.folder}/ are replaced faster than they can be read. Try again.")

    def prune(self, keep: Iterable[str]) -> int:
        """Delete the vectors of every adapter that is not in `keep`, and what dead writers left behind.

        Args:
            keep: names that `key` returned; of pictures `pixels.AdaptedPictures.key`.
        Returns:
            the bytes given back.
        Raises:
            StoreError: the folder cannot be read or changed.
        """
        kept = set(keep)
        freed = 0
        with _explain_disk_errors(self.folder):
            for home in _list_children(self.folder):
                if not _NAME.fullmatch(home.name):  # not ours to delete
                    continue
                if home.name not in kept:
                    freed += _discard(home)
                    continue
                for path in _list_children(home):
                    with suppress(FileNotFoundError):
                        old = time.time() - path.stat().st_mtime > _ABANDONED
                        freed += _discard(path) if path.name.startswith((DRAFT, TRASH)) and old else 0
        return freed

    def _open(self, encoder: Encoder, name: str) -> _CacheEntry | None:
        """Return what is kept under `name`, or None where nothing is, or not what was written."""
        path = self.folder / encoder.key / name
        try:
            with (path / _MANIFEST).open("rb") as file:
                manifest = _CacheManifest.model_validate_json(file.read(_MANIFEST_LIMIT))
            index = (path / _TEXTS).read_bytes()
            stat = (path / _VECTORS).stat()
            fits = (
                manifest.encoder == encoder.fields
                and manifest.dim == encoder.dim
                and len(index) == manifest.rows * _DIGEST
                and hashlib.sha256(index).hexdigest() == name
                and stat.st_size == manifest.rows * manifest.dim * 4
            )
            if not fits:
                return None
            if _read_stamp(stat) not in self._verified:
                with (path / _VECTORS).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != manifest.vectors_sha256:
                        return None
                self._verified.add(_read_stamp(stat))
            vectors = np.memmap(path / _VECTORS, "<f4", "r", shape=(manifest.rows, manifest.dim))
        except (OSError, ValueError):  # missing, no such manifest, or cut short between two of these lines
            return None
        return _CacheEntry(path, index, vectors)

    def _list_entries(self, encoder: Encoder) -> list[_CacheEntry]:
        names = [path.name for path in _list_children(self.folder / encoder.key) if _NAME.fullmatch(path.name)]
        return [entry for name in names if (entry := self._open(encoder, name)) is not None]

    def _write(
        self,
        encoder: Encoder,
        texts: Sequence[Any],
        digests: Sequence[bytes],
        entries: Sequence[_CacheEntry],
        progress: Progress | None,
        encoded: NDArray[np.float32] | None = None,
    ) -> int:
        """Keep the vectors of `texts`: those on `entries` are copied, the others encoded; return how many those were.

        `encoded`, where it is given, are the vectors of those others.

        An older state of the same catalogue goes: a entry at least half of whose texts are in the new one. Others
        stay, they are other catalogues under the same adapter.
        """
        name = _name_shelf(digests)
        target = self.folder / encoder.key / name
        unknown = _find_unknown(digests, entries)
        fresh = [texts[row] for row in unknown.values()]
        try:
            # First of all the folder: where we may not write, nothing is encoded in vain. What is there under this name
            # is damaged, or another writer was quicker with the same texts.
            with stage_folder(target, replace=lambda: self._open(encoder, name) is None, missed=False) as staged:
                sources = [entry.vectors for entry in entries]
                if encoded is not None:
                    sources.append(encoded)
                elif fresh:
                    sources.append(self._encode(encoder, fresh, staged.path / "encoded.f32", progress))
                checksum = self._copy(*_find_places(digests, entries, unknown), sources, staged.path / _VECTORS)
                sources.clear()
                (staged.path / "encoded.f32").unlink(missing_ok=True)
                (staged.path / _TEXTS).write_bytes(b"".join(digests))
                manifest = _CacheManifest(
                    encoder=encoder.fields, rows=len(digests), dim=encoder.dim, vectors_sha256=checksum
                )
                staged.manifest = (_MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode() + b"\n")
                self._verified.add(_read_stamp((staged.path / _VECTORS).stat()))
        except FileExistsError:
            # Another writer may have put it together with others, and so away, as soon as it was there.
            if self._open(encoder, name) is None and target.exists() and self._open(encoder, name) is None:
                raise StoreError(f"The damaged vectors in {target}/ cannot be replaced. Delete that folder.") from None
        present = set(digests)
        for entry in entries:
            if entry.path.name != name and 2 * len(entry.rows.keys() & present) >= len(entry.rows):
                _discard(entry.path)
        return len(fresh)

    def _encode(
        self, encoder: Encoder, texts: Sequence[Any], path: Path, progress: Progress | None
    ) -> NDArray[np.float32]:
        """Encode texts into a file, block by block; return it mapped."""
        # Written rather than mapped: on a full disk a write fails, a page of a mapped file ends the process.
        with path.open("wb") as file:
            for start in range(0, len(texts), self._block_rows):
                file.write(_view_bytes(encoder.encode(texts[start : start + self._block_rows], progress)))
        return np.memmap(path, "<f4", "r", shape=(len(texts), encoder.dim))

    def _copy(
        self, which: NDArray[np.int64], rows: NDArray[np.int64], sources: Sequence[NDArray[np.float32]], path: Path
    ) -> str:
        """Gather rows of several sources into a file, block by block; return its sha256."""
        checksum = hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, len(rows), self._block_rows):
                block = slice(start, start + self._block_rows)
                content = _view_bytes(_gather(which[block], rows[block], sources))
                checksum.update(content)
                file.write(content)
        return checksum.hexdigest()


def embed(
    bank: AdapterBank,
    texts: Sequence[str],
    reference: str | None,
    folder: str | Path,
    *,
    process: int = 0,
    processes: int = 1,
    patience: float = 600.0,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> int:
    """Encode a catalogue into a cache: here, by workers, or by processes that share nothing but the folder.

    Each process encodes its share of the texts that are not known yet; process 0 then waits for the others and puts
    the whole together, so that `VectorCache.vectors` maps it. Every process gives the same arguments but `process`.

    An executor's workers are handed texts and give back vectors, block by block. Each block is kept as it comes: a
    call that was ended, or of which workers died, goes on with what is missing.

    Args:
        texts: N texts, in the catalogue's order.
        reference: an adapter of `bank`; None is the frozen encoder.
        patience: seconds that process 0 waits, once its own share is done, before it encodes what others still owe.
        executor: whose workers encode, in the place of this process; see `peft_combo.distributed`.
    Returns:
        the number of texts this process, or the executor's workers, encoded.
    Raises:
        ValueError: no such process, or an executor beside several processes.
        StoreError: the adapter cannot be had, the folder not be read or written, or workers died of a block.
        PeftComboError: no worker could be started.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process: expected 0 to {processes - 1}, found {process}.")
    if executor is not None and processes > 1:
        raise ValueError(f"executor: expected none beside {processes} processes, which take shares themselves.")
    cache, encoder = VectorCache(folder), find_encoder(bank, reference)
    digests = _digest_texts(texts)
    if not digests:
        return 0
    encoded = 0
    with _explain_disk_errors(cache.folder):
        if executor is not None and cache._open(encoder, _name_shelf(digests)) is None:
            encoded += _embed_blocks(cache, encoder, texts, digests, executor, progress)
        if processes > 1 and cache._open(encoder, _name_shelf(digests)) is None:
            # Shares are of all texts, not of the unknown ones: by now another process may have made its own known.
            share = list(dict.fromkeys(digests))[process::processes]
            entries = cache._list_entries(encoder)
            unknown = _find_unknown(share, entries)
            if unknown:
                text_of = dict(zip(digests, texts, strict=True))
                own = [text_of[digest] for digest in unknown]
                encoded += cache._write(encoder, own, list(unknown), entries, progress)
        if process > 0:
            return encoded
        if processes > 1:
            _wait_for_others(cache, encoder, digests, time.monotonic() + patience)
        if cache._open(encoder, _name_shelf(digests)) is None:
            encoded += cache._write(encoder, texts, digests, cache._list_entries(encoder), progress)
    return encoded


def _embed_blocks(
    cache: VectorCache, encoder: FixedEncoder, texts: Sequence[str], digests: Sequence[bytes], executor: Executor,
    progress: Progress | None,
) -> int:  # fmt: skip
    """Let workers encode what is not known yet, keep every block as it comes, and return how many texts that were."""
    unknown = _find_unknown(digests, cache._list_entries(encoder))
    names, rows = list(unknown), list(unknown.values())
    blocks = cut_blocks(len(rows), executor.workers, cache._block_rows)
    shares = (encoder.build_share([texts[row] for row in rows[block]]) for block in blocks)
    encoded, lost = 0, ""
    for number, vectors in executor.map_shares(encode_share, shares):
        if isinstance(vectors, LostShare):
            lost = vectors.reason
            continue
        own = rows[blocks[number]]
        cache._write(encoder, [texts[row] for row in own], names[blocks[number]], (), None, vectors)
        encoded += len(own)
        if progress is not None:
            progress(len(own))
    if lost:
        raise StoreError(f"{len(rows) - encoded:,} texts were not encoded: {lost}. The others are kept; try again.")
    return encoded


def _wait_for_others(cache: VectorCache, encoder: FixedEncoder, digests: Sequence[bytes], deadline: float) -> None:
    """Return when every text is known, or time is up."""
    seen: set[str] = set()
    while time.monotonic() < deadline:
        names = {path.name for path in _list_children(cache.folder / encoder.key) if _NAME.fullmatch(path.name)}
        if names != seen and not _find_unknown(digests, cache._list_entries(encoder)):
            return
        seen = names
        time.sleep(_POLL_SECONDS)


class _CacheManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    encoder: dict[str, str | int | None]
    rows: Annotated[int, Field(strict=True, ge=1)]
    dim: Annotated[int, Field(strict=True, ge=1)]
    vectors_sha256: str


@dataclass(frozen=True)
class _CacheEntry:
    """Vectors kept together: those of one catalogue at one time, or of one process's share of it."""

    path: Path
    index: bytes  # R digests of texts, one after the other
    vectors: NDArray[np.float32]  # (R, D), mapped

    @cached_property
    def rows(self) -> dict[bytes, int]:
        return {self.index[start : start + _DIGEST]: start // _DIGEST for start in range(0, len(self.index), _DIGEST)}


def _digest_texts(texts: Sequence[str]) -> list[bytes]:
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]


def _name_shelf(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _find_unknown(digests: Sequence[bytes], entries: Sequence[_CacheEntry]) -> dict[bytes, int]:
    """Return each digest that no entry has, with the first row it stands in."""
    unknown: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        if digest not in unknown and not any(digest in entry.rows for entry in entries):
            unknown[digest] = row
    return unknown


def _find_places(
    digests: Sequence[bytes], entries: Sequence[_CacheEntry], unknown: Iterable[bytes] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each digest the entry and the row that have it, both (N,); `unknown` counts as one entry more."""
    places = {digest: (len(entries), row) for row, digest in enumerate(unknown)}
    for number, entry in enumerate(entries):
        places |= {digest: (number, row) for digest in digests if (row := entry.rows.get(digest)) is not None}
    found = np.array([places[digest] for digest in digests], np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _gather(
    which: NDArray[np.int64], rows: NDArray[np.int64], sources: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return row ``rows[i]`` of source ``which[i]`` for every i, (N, D)."""
    gathered = np.empty((len(rows), sources[0].shape[1]), np.float32)
    for number, source in enumerate(sources):
        own = np.flatnonzero(which == number)
        gathered[own] = source[rows[own]]
    return gathered


def _view_bytes(vectors: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(vectors, "<f4").data


def _make_read_only(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors.flags.writeable = False
    return vectors


def _read_stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _list_children(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _discard(path: Path) -> int:
    """Take a folder out of sight at once, then delete it; return its bytes. One that is gone, or held open, is 0."""
    try:
        trash = move_aside(path)
    except OSError:
        return 0
    freed = measure_size(trash)
    discard(trash)
    return freed


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The vector cache in {folder}/ cannot be used: {error.strerror or error}. Free some space, change the "
            "permissions, or name another folder."
        ) from error
