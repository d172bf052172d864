"""What a recipe works on: store, data, split, encoder, bank of adapters and vector cache, each opened once.

Owns the order in which they are opened: what costs nothing first. Knows nothing of what is then done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from peft_combo.recipe.parse import parse_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.lookup import explain_task

if TYPE_CHECKING:  # an adapter that is not stored is told before torch and the readers of data are loaded
    import numpy as np
    from numpy.typing import NDArray

    from peft_combo.data.assemble import Needs
    from peft_combo.data.model import Dataset
    from peft_combo.data.splits import Split
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.encoder.bank import AdapterBank
    from peft_combo.encoder.vectors import VectorCache
    from peft_combo.recipe.model import Recipe
    from peft_combo.store.versions import AdapterRecord


class Workspace:
    """Opens what a recipe names on first use: ``Workspace.of(recipe).bank.encode(texts, "fashion")``.

    Attributes:
        recipe: what is worked on.
        store: the adapters.
        records: the adapters that were asked for, in order; their manifests are read, their weights are not.
        on_note: told what was noticed while the data was read and the encoder loaded.
    """

    def __init__(
        self, recipe: Recipe, store: AdapterStore, records: tuple[AdapterRecord, ...], cache: Path, needs: Needs,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:  # fmt: skip
        self.recipe, self.store, self.records, self.on_note = recipe, store, records, on_note
        self._cache_folder, self._needs = cache, needs

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        adapters: Iterable[str] = (),
        store: str | Path | None = None,
        cache: str | Path = "vectors",
        needs: Needs = "bundles",
        on_note: Callable[[str], None] = lambda note: None,
    ) -> Self:
        """Resolve adapters in the store; nothing else is opened yet.

        Args:
            adapters: ``"fashion"``, ``"fashion@v2"`` or ``"fashion@prod"``.
            store: folder of the adapter store; None takes the recipe's.
            cache: folder of the vector cache.
            needs: what the data must hold beside items; see `open_dataset`.
            on_note: told what is noticed while the data is read and the encoder loaded.
        Raises:
            StoreError: an adapter is not stored, or its manifest cannot be read.
        """
        opened = AdapterStore(recipe.store if store is None else store)
        return cls(recipe, opened, tuple(map(opened.open, adapters)), Path(cache), needs, on_note)

    @classmethod
    def of_adapter(
        cls,
        reference: str,
        *,
        store: str | Path,
        data: Path | None = None,
        cache: str | Path = "vectors",
        needs: Needs = "bundles",
        task: str | None = None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> Self:
        """Open the recipe that an adapter was tuned with; what is not told here is as for `of`.

        Args:
            data: folder of other data, in place of the recipe's.
            task: what the adapter has to be tuned for.
        Raises:
            StoreError: the adapter is not stored, or was tuned for another task.
            RecipeError: it has no recipe, or one that cannot be read.
        """
        opened = AdapterStore(store)
        record = opened.open(reference)
        found = record.manifest.task.get("kind")
        if task is not None and found is not None and found != task:
            raise explain_task(record.reference, str(found), task)
        recipe = parse_recipe(record.manifest.recipe, f"The recipe of {reference} cannot be read:")
        if data is not None:
            source = "bundlerec" if recipe.data.source == "bundlerec" else "folder"
            config = recipe.data.model_copy(update={"source": source, "path": str(data)})
            recipe = recipe.model_copy(update={"data": config})
        return cls(recipe, opened, (record,), Path(cache), needs, on_note)

    @cached_property
    def dataset(self) -> Dataset:
        """Items, and the bundles or interactions needed.

        Raises:
            DataError: see `open_dataset`.
        """
        from peft_combo.data.sources import open_dataset

        found = open_dataset(self.recipe.data, self._needs)
        for note in found.notes:
            self.on_note(f"{found.name}: {note}")
        return found

    @cached_property
    def split(self) -> Split:
        """Training, validation and test bundles, as the recipe divides them."""
        from peft_combo.data.splits import split_as

        return split_as(self.dataset, self.recipe.data)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen encoder that the recipe names."""
        from peft_combo.encoder.backbone import Backbone

        found = Backbone.of(self.recipe.backbone)
        if self.recipe.backbone.vocabulary == "catalog":
            from peft_combo.encoder.vocabulary import cut_backbone

            read = {text for texts in (self.dataset.texts, *self.dataset.read_frozen) for text in texts}
            found = cut_backbone(found, sorted(read))
        for note in found.notes:
            self.on_note(note)
        return found

    @cached_property
    def bank(self) -> AdapterBank:
        """The encoder with every adapter of the store."""
        from peft_combo.encoder.bank import AdapterBank

        return AdapterBank(self.backbone, self.store)

    @cached_property
    def cache(self) -> VectorCache:
        """Item vectors on disk."""
        from peft_combo.encoder.vectors import VectorCache

        return VectorCache(self._cache_folder)

    def encode_catalog(
        self, adapter: str | None = None, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Return the item vectors (N, D) under an adapter, or of the frozen encoder; from the cache where it has them.

        An adapter reads texts as the recipe has them, and pictures where it was tuned with them; the frozen encoder
        texts without category; see `encode_described` and `encode_looks`.

        Args:
            progress: told how many texts were encoded.
        """
        if adapter is None:
            return self.cache.vectors(self.bank, self.dataset.plain, None, progress)
        from peft_combo.recommender.item_pictures import append_pictures

        texts = self.cache.vectors(self.bank, self.dataset.texts, adapter, progress)
        return append_pictures(texts, self.dataset, self.bank.get(adapter), self.cache, progress)

    def encode_looks(self, progress: Callable[[int], None] | None = None) -> NDArray[np.float32] | None:
        """Return the frozen vision encoder's vectors (N, W) of pictures; None where none are read."""
        from peft_combo.recommender.item_pictures import encode_looks

        return encode_looks(self.dataset, self.bank, self.cache, progress)

    def encode_described(
        self, frozen: NDArray[np.float32], progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32] | None:
        """Return the frozen encoder's vectors (N, D) of texts with category paths; None where no item has one.

        Args:
            frozen: what `encode_catalog` gives of the frozen encoder.
            progress: told how many texts were encoded.
        """
        from peft_combo.recommender.fit_data import encode_described

        return encode_described(
            self.dataset, frozen, lambda texts: self.cache.vectors(self.bank, texts, None, progress)
        )

    def count_texts(self, adapters: int) -> int:
        """Return how many texts are encoded for the frozen encoder and so many adapters, where no cache has them."""
        return sum(map(len, self.dataset.read_frozen)) + adapters * len(self.dataset.texts)
