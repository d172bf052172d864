"""Items that come and go while the service runs: encoded at once, and part of every release in use.

Owns what the state says of items, as a catalogue says it, and their vectors by adapter. Knows releases; nothing of who
asks for them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog, Dataset
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.errors import DataError, did_you_mean, shorten
from peft_combo.recommender.live_catalog import DESCRIBED, TITLE, LiveItem, extend_recommender, make_catalog
from peft_combo.recommender.scorer_id import CEASE_BERT, PEER, TEXT_RANKER, WORDS
from peft_combo.serving.answers import ItemOutcome
from peft_combo.serving.batching import EncodeBatcher
from peft_combo.serving.live_counts import LiveCounts
from peft_combo.serving.release import Release, ReleaseView
from peft_combo.serving.state import ItemRow

_FIELDS = ("title", "category", "slot", "price", "description")
_TEXT_LIMIT, _COLUMNS, _ID_LIMIT = 10_000, 64, 200
_BATCH = 64  # texts that go to the batcher at once, so that queries find room between them


@dataclass(frozen=True, eq=False)
class _Overlay:
    """What the state says of items at one moment.

    Attributes:
        items: new and changed ones by id, in the order they first came. hidden: ids that were deleted.
        encoded: ids of items that are new or have another text than in the dataset, so that they need vectors.
        number: grows with every change. texts: grows when a text that was there changed.
    """

    items: Mapping[str, LiveItem] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    encoded: frozenset[str] = frozenset()
    number: int = 0
    texts: int = 0


class LiveItems:
    """New, changed and deleted items over a dataset; safe to share between threads."""

    def __init__(self, dataset: Dataset, batcher: EncodeBatcher, counts: LiveCounts) -> None:
        self._dataset, self._batcher, self._counts = dataset, batcher, counts
        self._overlay = _Overlay()
        self._lock = threading.Lock()  # over the change of the overlay
        self._seen: dict[int, int] = {}  # id of a release's buffers -> `texts` of what they hold

    @property
    def number(self) -> int:
        """Grows with every change."""
        return self._overlay.number

    def count(self) -> tuple[int, int]:
        """Return how many items were put and not deleted, and how many are deleted."""
        overlay = self._overlay
        return len(overlay.items.keys() - overlay.hidden), len(overlay.hidden)

    def check(self, values: Mapping[str, Any]) -> ItemRow:
        """Return an item to store: what was known of it, with what is said now.

        Raises:
            DataError: a value is none that the field may have, or a new item has no title.
        """
        item_id = values.get("item_id")
        if not isinstance(item_id, str) or not item_id.strip() or len(item_id) > _ID_LIMIT:
            raise DataError(f"item_id: expected a text of 1 to {_ID_LIMIT} characters, found {shorten(repr(item_id))}.")
        fields = dict(self._fields_of(item_id) or {})
        for name, value in values.items():
            if name != "item_id":
                fields[name] = _check_value(name, value)
        if len(fields) > _COLUMNS + len(_FIELDS):
            raise DataError(f"{shorten(item_id)}: an item has at most {_COLUMNS} columns more, found {len(fields)}.")
        if not str(fields.get("title") or "").strip():
            raise DataError(
                f"{shorten(item_id)}: a new item needs a title. Found the fields {', '.join(fields) or 'none'}."
            )
        return ItemRow(item_id, {name: value for name, value in fields.items() if value is not None})

    def knows(self, item_id: str) -> bool:
        """Say whether there is such an item, deleted ones aside."""
        overlay = self._overlay
        return item_id not in overlay.hidden and (item_id in overlay.items or item_id in self._dataset.catalog.index)

    def apply(self, rows: Sequence[ItemRow], releases: Collection[Release]) -> None:
        """Take in rows of the state, oldest first, and encode their texts for every release in use."""
        if not rows:
            return
        with self._lock:
            overlay = self._overlay
            items, hidden, encoded = dict(overlay.items), set(overlay.hidden), set(overlay.encoded)
            texts = overlay.texts
            for row in rows:
                if row.deleted:
                    hidden.add(row.item_id)
                    continue
                hidden.discard(row.item_id)
                item, before = _read_item(row), items.get(row.item_id)
                own = self._list_texts(item)
                if before is not None and self._list_texts(before) == own:
                    item = replace(item, vectors=before.vectors)
                elif before is not None:
                    texts += 1
                place = self._dataset.catalog.index.get(row.item_id)
                if place is None or self._list_texts(_take_item(self._dataset.catalog, place)) != own:
                    encoded.add(row.item_id)
                else:
                    encoded.discard(row.item_id)
                    item = replace(item, vectors={})
                items[row.item_id] = item
            changed = [items[name] for name in dict.fromkeys(row.item_id for row in rows) if name in encoded]
            items |= self._encode(changed, releases)
            self._overlay = _Overlay(items, frozenset(hidden), frozenset(encoded), overlay.number + 1, texts)

    def note_late(self, outcomes: Sequence[ItemOutcome], releases: Collection[Release]) -> list[ItemOutcome]:
        """Say of items whose texts are no longer those that were fitted which scorers still read the old ones."""
        late = sorted({str(one) for release in releases for one in release.base.state.fusion.needs if one in _FITTED})
        if not late:
            return list(outcomes)
        note = f"Its text has changed: {', '.join(late)} read the old one until the recommender is fitted again."
        known, changed = self._dataset.catalog.index, self._overlay.encoded
        return [
            replace(one, note=note) if one.accepted and one.item_id in known and one.item_id in changed else one
            for one in outcomes
        ]

    def note_counts(self) -> None:
        """Say that more was bought: every release is to be shown anew."""
        with self._lock:
            self._overlay = replace(self._overlay, number=self._overlay.number + 1)

    def view(self, release: Release) -> ReleaseView:
        """Return a release with the items of this moment, and what was bought until now."""
        with self._lock:
            overlay = self._overlay
            base = self._counts.fold(release)
            if not overlay.items and not overlay.hidden:
                return ReleaseView(release, base, overlay.number)
            made = self._encode([overlay.items[name] for name in overlay.encoded], [release])  # what came before it
            if made:
                overlay = replace(overlay, items={**overlay.items, **made})
                self._overlay = overlay
            again = self._seen.get(id(release.buffers), overlay.texts) != overlay.texts
            self._seen[id(release.buffers)] = overlay.texts
            recommender = extend_recommender(
                base, list(overlay.items.values()), overlay.hidden, release.buffers, again=again
            )
            return ReleaseView(release, recommender, overlay.number)

    def drop(self, release: Release) -> None:
        """Forget vectors that only this release needed."""
        with self._lock:
            self._seen.pop(id(release.buffers), None)
            if release.adapter is not None and self._overlay.items:
                name = release.adapter.reference
                items = {
                    key: replace(one, vectors={n: v for n, v in one.vectors.items() if n != name})
                    for key, one in self._overlay.items.items()
                }
                self._overlay = replace(self._overlay, items=items)

    def _fields_of(self, item_id: str) -> Mapping[str, Any] | None:
        overlay = self._overlay
        item = overlay.items.get(item_id)
        if item is None:
            place = self._dataset.catalog.index.get(item_id)
            if place is None:
                return None
            item = _take_item(self._dataset.catalog, place)
        return _list_fields(item)

    def _encode(self, items: Sequence[LiveItem], releases: Collection[Release]) -> dict[str, LiveItem]:
        """Return items with the vectors they lack."""
        kinds: dict[str, tuple[str, LiveAdapter | None]] = {
            name: (template, None) for name, template in self._frozen_templates.items()
        }
        for release in releases:
            if release.adapter is not None:
                kinds[release.adapter.reference] = (self._dataset.text_template, release.adapter)
        found: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name, (template, adapter) in kinds.items():
            lacking = [one for one in items if name not in one.vectors]
            texts = make_catalog(lacking, self._dataset.catalog.attributes).texts(template) if lacking else []
            for start in range(0, len(texts), _BATCH):
                part = slice(start, start + _BATCH)
                vectors = self._batcher.encode(texts[part], adapter)
                for one, vector in zip(lacking[part], vectors, strict=True):
                    found.setdefault(one.item_id, {})[name] = vector
        return {
            one.item_id: replace(one, vectors={**one.vectors, **found[one.item_id]})
            for one in items
            if one.item_id in found
        }

    def _list_texts(self, item: LiveItem) -> list[str]:
        """Return what encoders read of an item."""
        templates = [*self._frozen_templates.values(), self._dataset.text_template]
        part = make_catalog([item], self._dataset.catalog.attributes)
        return [part.texts(template)[0] for template in templates]

    @property
    def _frozen_templates(self) -> dict[str, str]:
        plain = self._dataset.plain_template
        return {TITLE: plain, **({} if self._dataset.described is None else {DESCRIBED: plain + " {category}"})}


# Scorers that learn a matrix of the items' texts when they are fitted; all others read a text when it comes.
_FITTED = (PEER, CEASE_BERT, TEXT_RANKER, WORDS)


def _check_value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "price":
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise DataError(f"price: expected a number of at least 0, found {shorten(repr(value))}.")
        return float(value)
    if name == "category" and isinstance(value, list | tuple):
        value = CATEGORY_SEPARATOR.join(map(str, value))
    if isinstance(value, bool | int | float):
        value = str(value)
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        raise DataError(f"{shorten(name)}: expected a text of at most {_TEXT_LIMIT:,} characters, or a number.")
    if name not in _FIELDS and (not name.isprintable() or not 0 < len(name) <= _ID_LIMIT):
        raise DataError(f"A column is named by 1 to {_ID_LIMIT} printable characters, found {shorten(repr(name))}.")
    near = did_you_mean(name, _FIELDS)
    if name.casefold() in _FIELDS and name not in _FIELDS:
        raise DataError(f'No field "{shorten(name)}". {near}')
    if name == "stock":
        try:
            float(value)
        except ValueError as error:
            raise DataError(f"stock: expected a number, found {shorten(repr(value))}.") from error
    return value


def _read_item(row: ItemRow) -> LiveItem:
    fields = {name: value for name, value in row.fields.items() if value is not None}
    path = tuple(part.strip() for part in str(fields.get("category") or "").split(CATEGORY_SEPARATOR.strip()))
    price = fields.get("price")
    return LiveItem(
        row.item_id, str(fields.get("title") or ""), tuple(part for part in path if part),
        str(fields["slot"]) if fields.get("slot") else None, None if price is None else float(price),
        str(fields.get("description") or ""),
        {name: str(value) for name, value in fields.items() if name not in _FIELDS},
    )  # fmt: skip


def _take_item(catalog: Catalog, row: int) -> LiveItem:
    price = float(catalog.prices[row])
    return LiveItem(
        catalog.item_ids[row], catalog.titles[row], catalog.categories[row], catalog.slots[row],
        None if math.isnan(price) else price, catalog.descriptions[row],
        {name: values[row] for name, values in catalog.attributes.items() if values[row] is not None},
    )  # fmt: skip


def _list_fields(item: LiveItem) -> dict[str, Any]:
    return {
        "title": item.title, "category": CATEGORY_SEPARATOR.join(item.category), "slot": item.slot,
        "price": item.price, "description": item.description, **item.attributes,
    }  # fmt: skip
