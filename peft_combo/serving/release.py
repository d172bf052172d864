"""Releases: adapter, item vectors and fitted recommender as one value with a digest, built whole and warmed up.

Owns how a release comes to be and what it holds. Nothing in a release changes: a request takes one and keeps it to its
end, and one that nobody holds any more is gone. Knows nothing of aliases or of who asks.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import PeftComboError
from peft_combo.recommender.live_catalog import VectorBuffers
from peft_combo.recommender.persistence import load_or_fit
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.text_search import FROZEN_ALL, FROZEN_TITLE, VectorView, View
from peft_combo.serving.batching import EncodeBatcher
from peft_combo.serving.drift import Drift
from peft_combo.serving.encoders import Encoders
from peft_combo.serving.errors import RefusedRelease

FROZEN = "frozen"
"""The version that is the encoder without adapter."""


@dataclass(frozen=True, eq=False)
class Release:
    """One version ready to answer.

    Attributes:
        version: as in fashion@v3, or `FROZEN`. adapter: None where frozen.
        digest: of the adapter; of the encoder where frozen. release: digest of all that answers depend on.
        base: as it was fitted. buffers: room for items that come later.
        built_s: how long building took. since: when it was built.
    """

    version: str
    adapter: LiveAdapter | None
    digest: str
    release: str
    base: BundleRecommender
    built_s: float
    since: float
    buffers: VectorBuffers = field(default_factory=VectorBuffers)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter and of the item vectors made with it, mapped ones included."""
        own = 0 if self.adapter is None else self.adapter.nbytes
        return own + sum(vectors.nbytes for vectors, _ in self.base.state.known.tuned.values())

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Quality figures of the manifest."""
        return {} if self.adapter is None else dict(self.adapter.record.manifest.metrics)


@dataclass(frozen=True, eq=False)
class ReleaseView:
    """A release with the items of one moment: what a request answers from.

    Attributes:
        items: number that grows with every change of items.
    """

    release: Release
    recommender: BundleRecommender
    items: int


class ReleaseBuilder:
    """Builds releases of one dataset and encoder; what is built and still in use is not built twice.

    Args:
        fitted: folder of fitted recommenders.
        encoders: the form of the encoder that reads queries. batcher: encodes the words of requests.
        drift: told of query vectors. on_note: told what a recommender was fitted without.
    """

    def __init__(
        self, dataset: Dataset, parts: Split, bank: AdapterBank, cache: VectorCache, fitted: Path, seed: int,
        encoders: Encoders, batcher: EncodeBatcher, drift: Drift, on_note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.dataset, self.bank = dataset, bank
        self._parts, self._cache, self._fitted, self._seed = parts, cache, fitted, seed
        self._encoders, self._batcher, self._drift, self._on_note = encoders, batcher, drift, on_note
        self._building = threading.Lock()

    def build(self, version: str, on_stage: Callable[[str], None] = lambda stage: None) -> Release:
        """Build a release and let it answer once.

        Args:
            version: as in fashion@v3, or `FROZEN`.
        Raises:
            RefusedRelease: the adapter is damaged, foreign, of another task, or gives no answer.
        """
        started = time.monotonic()
        with self._building:  # one at a time: fitting takes all the memory it is given
            try:
                on_stage("verifying")
                adapter = None if version == FROZEN else self.bank.get(version)
                on_stage("encoding and fitting")
                references = () if adapter is None else (adapter.reference,)
                base = load_or_fit(
                    self._fitted, self.dataset, self._parts, self.bank, references, seed=self._seed, cache=self._cache,
                    done=lambda name: on_stage(f"fitted {name}"),
                )  # fmt: skip
                if adapter is not None and base.state.adapters[0] is not adapter:
                    adapter = base.state.adapters[0]  # evicted and loaded again: the one that its heads are of
                on_stage("indexing")
                base = base.with_retrieval()
                on_stage("opening the encoder")
                for one in {None, adapter}:
                    self._encoders.open(one)
                base = self._encode_in_batches(base)
                on_stage("warming up")
                self._warm_up(base)
            except PeftComboError as error:
                raise RefusedRelease(f"{version} is not taken into use: {error}") from error
            except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RefusedRelease(f"{version} is not taken into use: {reason}") from error
        for note in base.state.notes:
            self._on_note(f"{version}: {note}")
        digest = self.bank.backbone.fingerprint if adapter is None else adapter.digest
        return Release(
            version, adapter, digest, self._digest(digest, base), base, time.monotonic() - started, time.time()
        )

    def drop(self, release: Release) -> None:
        """Forget what only a release needed that nobody uses any more."""
        self._drift.drop(release.release, release.digest)
        if release.adapter is not None:
            self._encoders.close(release.digest)
            self._batcher.forget(release.digest)

    def _digest(self, adapter: str, base: BundleRecommender) -> str:
        told = [
            adapter, self.bank.backbone.fingerprint, self.dataset.digest, self.dataset.text_template,
            self._parts.digest, self._seed, base.state.fusion.state(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    def _encode_in_batches(self, base: BundleRecommender) -> BundleRecommender:
        """Let the words of requests go through the batcher, with the very adapter of this release."""
        adapters = {one.reference: one for one in base.state.adapters}
        fingerprint = self.bank.backbone.fingerprint

        def encode_by(adapter: LiveAdapter | None) -> Callable[[Sequence[str]], NDArray[np.float32]]:
            def encode(texts: Sequence[str]) -> NDArray[np.float32]:
                vectors = self._batcher.encode(texts, adapter)
                self._drift.add_vectors(fingerprint if adapter is None else adapter.digest, vectors)
                return vectors

            return encode

        views: dict[str, View] = dict(base.state.search.views)
        for name, view in base.state.search.views.items():
            if isinstance(view, VectorView):
                adapter = None if name in (FROZEN_TITLE, FROZEN_ALL) else adapters[name]
                views[name] = VectorView(view.items, encode_by(adapter))
        state = replace(base.state, search=replace(base.state.search, views=views))
        return BundleRecommender(base.dataset, base.bank, state, composer=base.composer, like=base)

    def _warm_up(self, base: BundleRecommender) -> None:
        """Answer what touches every part once: scorers, composer, encoder. Their first call is their slowest."""
        catalog = self.dataset.catalog
        item = catalog.item_ids[int(np.argmax(base.state.known.support))]
        if not base.complete([item], k=1):
            raise ValueError("its warm-up request had no answer")
        base.compose([item])
        base.complete(query=catalog.titles[0], k=1)
