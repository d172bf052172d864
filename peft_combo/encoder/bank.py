"""Adapter bank: all adapters of a store over one encoder, loaded when first wanted, evicted by size, hot-swapped.

Owns which versions are loaded, which one a category means at the moment, and when one is let go. Nothing is ever
switched: an adapter is a value that a request takes and keeps for as long as it needs it, so what another thread loads,
refreshes or evicts meanwhile cannot reach it. Knows nothing of items, catalogues or scores.
"""

from __future__ import annotations

import json
import shlex
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from torch import Tensor, nn

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.base import HEAD_FILE, HeadT, TaskHead
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import StoreError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.lookup import explain_task
from peft_combo.store.references import Version, parse_reference
from peft_combo.store.versions import AdapterRecord

if TYPE_CHECKING:
    from peft_combo.encoder.pixels import AdaptedPictures


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """One stored version, ready to encode; two are the same only if they are the same object.

    Attributes:
        record: what the store says of it; every byte was checked when it was loaded.
        attached: hand it to `Backbone.encode`.
        pictures: the vision encoder with the adapter that was tuned beside; None where it reads texts alone.
        task_head: what stands on the encoder, by task.
        nbytes: bytes of the tensors it does not share with the backbone: adapter, weights of its own, head. The
            modules around them cost some 0.4 MiB more.
    """

    record: AdapterRecord
    attached: AttachedAdapter
    task_head: TaskHead
    nbytes: int
    pictures: AdaptedPictures | None = None

    @property
    def head(self) -> BundleHead:
        """The head of a bundle adapter of texts alone, which turns item vectors into queries and targets.

        Raises:
            StoreError: see `head_as`; or the adapter reads pictures as well, so vectors of texts are half of what it
                takes.
        """
        found = self.head_as(BundleHead)
        if found.picture is not None:
            raise StoreError(
                f"Adapter {self.reference} reads pictures beside texts; expected one that reads texts alone. Tune one "
                "with: --set backbone.image_model=null"
            )
        return found

    def head_as(self, wanted: type[HeadT]) -> HeadT:
        """Return the head as the one of a certain task.

        Raises:
            StoreError: the adapter was tuned for another task.
        """
        if not isinstance(self.task_head, wanted):
            raise explain_task(self.reference, self.task_head.kind, wanted.kind)
        return self.task_head

    @property
    def reference(self) -> str:
        """Category and version, ``fashion@v2``."""
        return self.record.reference

    @property
    def digest(self) -> str:
        """Identity of the stored artefact, in hexadecimal digits; what was computed with it is cached under this."""
        return self.record.digest


class AdapterBank:
    """The adapters of a store over one backbone: ``bank.get("fashion")``, ``bank.encode(texts, "fashion@v2")``.

    Any number of threads may use one bank. They wait for each other only where they want the same version and it is
    being loaded; it is loaded once. A load that fails leaves the bank as it was.

    Args:
        backbone: must be the one the adapters were tuned on; another is refused adapter by adapter.
        limit_mib: the adapters kept for later take at most so many MiB (`LiveAdapter.nbytes`); the ones asked for
            longest ago go first. One that is larger is loaded all the same, and kept alone. What goes lives on for the
            requests that hold it.
    """

    def __init__(self, backbone: Backbone, store: AdapterStore, limit_mib: float = 512.0) -> None:
        if not limit_mib >= 0:
            raise ValueError(f"limit_mib: expected a number of MiB, 0 or more, found {limit_mib}.")
        self.backbone = backbone
        self.store = store
        self.limit_bytes = int(min(limit_mib, 2.0**40) * 2**20)
        self._lock = threading.Lock()  # over the next two; held for look-ups only, never while something loads
        self._live: OrderedDict[str, LiveAdapter] = OrderedDict()  # by reference with version, longest unused first
        self._current: dict[str, Version] = {}  # category or alias -> the version it means
        # One lock per version that is being loaded; it goes when no thread uses it any more.
        self._gates: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self._refreshing = threading.Lock()
        frozen = [backbone.model] if backbone.pictures is None else [backbone.model, backbone.pictures.model]
        self._shared = {id(tensor) for model in frozen for tensor in _tensors(model)}

    @property
    def loaded(self) -> tuple[LiveAdapter, ...]:
        """The adapters kept in memory, the one to go next first."""
        with self._lock:
            return tuple(self._live.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters kept in memory."""
        return sum(live.nbytes for live in self.loaded)

    def get(self, reference: str) -> LiveAdapter:
        """Return an adapter, loaded if it is not in memory.

        Args:
            reference: ``fashion@v2``; ``fashion`` for the version that was the latest when the category was first
                asked for, ``fashion@prod`` for the one the alias pointed to then. Only `refresh` moves on from there.
        Raises:
            StoreError: not stored, damaged, or tuned on another backbone.
            BackboneError: a prefix leaves too few of the encoder's positions for text.
        """
        wanted = parse_reference(reference)
        if wanted.version is not None:
            return self._version(Version(wanted.category, wanted.version))
        with self._lock:
            current = self._current.get(reference)
        if current is not None:
            return self._version(current)
        live = self._load_meaning(reference)
        with self._lock:
            current = self._current.setdefault(reference, Version(live.record.category, live.record.version))
        # A refresh may have been quicker with a newer version: then that is what the name means.
        return live if str(current) == live.reference else self._version(current)

    def refresh(self, reference: str) -> LiveAdapter:
        """Load what a category or an alias means by now beside the version in use, then let the name mean the new one.

        Requests under way finish with the adapter they hold; later ones get the new one. Where the new one cannot be
        loaded, the old one stays in use.

        Args:
            reference: ``fashion`` goes to the newest version, ``fashion@prod`` to the one the alias points to.
        Raises:
            StoreError: not stored, damaged, tuned on another backbone, or one version, which never means another.
        """
        wanted = parse_reference(reference)
        if wanted.version is not None:
            raise StoreError(
                f'"{reference}" is one version and stays it. Refresh the category ({wanted.category}) or an alias '
                f"({wanted.category}@prod)."
            )
        with self._refreshing:  # in turn, so that of two the one that looked later also has the last word
            live = self._load_meaning(reference)
            with self._lock:
                before = self._current.get(reference)
                self._current[reference] = Version(live.record.category, live.record.version)
                if before not in self._current.values() and str(before) in self._live:
                    self._live.move_to_end(str(before), last=False)
        return live

    def encode(self, texts: Sequence[str], reference: str | None) -> NDArray[np.float32]:
        """Encode texts with one adapter; None is the frozen encoder.

        Returns:
            (B, D) float32, rows of unit length.
        Raises:
            StoreError: the adapter cannot be had.
        """
        live = None if reference is None else self.get(reference)
        return self.backbone.encode(texts, None if live is None else live.attached)

    def encode_mixed(self, texts: Sequence[str], references: Sequence[str | None]) -> NDArray[np.float32]:
        """Encode texts of several adapters, one pass for each adapter.

        All adapters are fetched before the first text is encoded: one that cannot be had fails the request as a whole,
        and a category means the same version in all its rows.

        Args:
            texts: B texts.
            references: for each text its adapter, None for the frozen encoder.
        Returns:
            (B, D) float32, rows of unit length in the order of `texts`.
        Raises:
            ValueError: not one reference for each text.
            StoreError: an adapter cannot be had.
        """
        if len(texts) != len(references):
            raise ValueError(f"expected one reference for each text, found {len(references)} for {len(texts)} texts.")
        named = {name: None if name is None else self.get(name) for name in dict.fromkeys(references)}
        rows: dict[LiveAdapter | None, list[int]] = {}
        for row, reference in enumerate(references):
            rows.setdefault(named[reference], []).append(row)  # "food" and "food@v1" may be one adapter
        vectors = np.empty((len(texts), self.backbone.dim), np.float32)
        for live, places in rows.items():
            own = [texts[row] for row in places]
            vectors[places] = self.backbone.encode(own, None if live is None else live.attached)
        return vectors

    def _load_meaning(self, reference: str) -> LiveAdapter:
        """Load what a category or an alias means at this moment."""
        found = self.store.resolve(reference)
        while True:
            try:
                return self._version(found)
            except StoreError:
                # It may have moved on, and its version been taken out, between the two lines.
                before, found = found, self.store.resolve(reference)
                if found == before:
                    raise

    def _version(self, version: Version) -> LiveAdapter:
        key = str(version)
        live = self._find_loaded(key)
        if live is not None:
            return live
        with self._lock:
            gate = self._gates.get(key)
            if gate is None:
                gate = self._gates[key] = threading.Lock()
        with gate:
            live = self._find_loaded(key)
            if live is not None:  # another thread loaded it while we waited
                return live
            live = self._load(key)
            with self._lock:
                self._live[key] = live
                kept = sum(adapter.nbytes for adapter in self._live.values())
                while kept > self.limit_bytes and len(self._live) > 1:
                    _, gone = self._live.popitem(last=False)
                    kept -= gone.nbytes
        return live

    def _find_loaded(self, key: str) -> LiveAdapter | None:
        with self._lock:
            live = self._live.get(key)
            if live is not None:
                self._live.move_to_end(key)
            return live

    def _load(self, reference: str) -> LiveAdapter:
        record = self.store.open(reference)
        try:
            weights = tensors_in(record.read(HEAD_FILE))
        except SafetensorError as error:
            raise StoreError(f"The head of adapter {record.reference} does not read: {error}.") from error
        head = load_head(record.manifest.task, weights)
        if head.dim != self.backbone.dim:
            raise StoreError(
                f"The head of adapter {record.reference} takes vectors of width {head.dim}, the backbone "
                f"{self.backbone.name} makes vectors of width {self.backbone.dim}."
            )
        attached = self.backbone.attach(record)
        pictures = self._adapt_pictures(record, head)
        modules = [attached.encoder, head, *([] if pictures is None else [pictures.model])]
        own = {id(t): t for m in modules for t in _tensors(m) if id(t) not in self._shared}
        for tensor in own.values():
            # safetensors maps files: whoever cut one short would end this process, and not only its answers.
            tensor.data = tensor.data.to(self.backbone.device, copy=True)
        return LiveAdapter(record, attached, head, sum(t.numel() * t.element_size() for t in own.values()), pictures)

    def _adapt_pictures(self, record: AdapterRecord, head: TaskHead) -> AdaptedPictures | None:
        """Put an adapter's part for pictures into a copy of the vision encoder; None where it has none.

        Raises:
            StoreError: the vision encoder is another one than it was tuned on, or there is none.
        """
        view = head.picture if isinstance(head, BundleHead) else None
        if view is None:
            return None
        stamp, encoder = record.manifest.backbone, self.backbone.pictures
        if encoder is None or encoder.fingerprint != stamp.image_fingerprint:
            found = "there is none" if encoder is None else f"found {encoder.name} with other weights"
            raise StoreError(
                f"Adapter {record.reference} reads pictures with the vision encoder {stamp.image_model}; {found}. Take "
                f"--set {shlex.quote(f'backbone.image_model={stamp.image_model}')}, or "
                f"Backbone.load(image_model={json.dumps(stamp.image_model)})."
            )
        return encoder.adapt(view.adapter, record.digest)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
