"""Data model: catalogue, interactions, bundles, and the dataset that holds them.

Owns what they hold, the map from outside ids to rows, and the digest that says two datasets are the same. Knows nothing
of files, sources or splits. Outside ids are strings and appear here only; everything else works on row numbers.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.data.digest import compute_digest
from peft_combo.data.language import Language, split_all
from peft_combo.errors import DataError, did_you_mean, shorten

if TYPE_CHECKING:
    from peft_combo.data.knowledge.rule_set import Knowledge
    from peft_combo.data.pictures import Picture
    from peft_combo.data.sessions import Sessions

CATEGORY_SEPARATOR = " > "
_BUILT_IN_FIELDS = ("title", "category", "leaf", "slot", "price", "description")


@dataclass(frozen=True, eq=False)
class Catalog:
    """All items of a dataset, one row each.

    Attributes:
        item_ids: outside ids, distinct.
        titles: the product title of each item.
        categories: the category path of each item from the root to the leaf; () where unknown.
        slots: the part an item plays in a bundle ("top", "shoes"); None where unknown.
        prices: (N,) float32; NaN where unknown.
        descriptions: longer text; "" where unknown.
        attributes: per further column (brand, colour, stock ...) one value or None per item.
        language: what texts are read as where words are told apart; no part of a dataset's digest.
        pictures: where the picture of each item lies, None for an item without one; () where no item has any.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    slots: tuple[str | None, ...]
    prices: NDArray[np.float32]
    descriptions: tuple[str, ...]
    attributes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    language: Language = "auto"
    pictures: tuple[Picture | None, ...] = ()

    @classmethod
    def build(
        cls,
        item_ids: Iterable[str],
        titles: Iterable[str],
        categories: Iterable[tuple[str, ...]] | None = None,
        slots: Iterable[str | None] | None = None,
        prices: ArrayLike | None = None,
        descriptions: Iterable[str] | None = None,
        attributes: Mapping[str, Iterable[str | None]] | None = None,
        pictures: Iterable[Picture | None] = (),
    ) -> Self:
        """Make a catalogue, filling what is not given with "unknown".

        Raises:
            ValueError: a column has another length than `item_ids`, or an id occurs twice.
        """
        ids, shown = tuple(item_ids), tuple(pictures)
        n = len(ids)
        catalog = cls(
            item_ids=ids,
            titles=tuple(titles),
            categories=tuple(categories) if categories is not None else ((),) * n,
            slots=tuple(slots) if slots is not None else (None,) * n,
            prices=np.full(n, np.nan, np.float32) if prices is None else np.asarray(prices, dtype=np.float32),
            descriptions=tuple(descriptions) if descriptions is not None else ("",) * n,
            attributes={name: tuple(values) for name, values in sorted((attributes or {}).items())},
            pictures=shown if any(picture is not None for picture in shown) else (),
        )
        columns = {
            "titles": catalog.titles, "categories": catalog.categories, "slots": catalog.slots,
            "prices": catalog.prices, "descriptions": catalog.descriptions, "pictures": shown or ids,
            **catalog.attributes,
        }  # fmt: skip
        for name, column in columns.items():
            if len(column) != n:
                raise ValueError(f"{n} items but {len(column)} {name}")
        if len(catalog.index) != n:
            raise ValueError("item ids must be distinct")
        catalog.prices.flags.writeable = False
        return catalog

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each outside id."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def in_stock(self) -> NDArray[np.bool_]:
        """(N,) False where a `stock` attribute says that none is left; an unknown stock counts as available."""
        stock = self.attributes.get("stock", (None,) * len(self))
        return np.array([left is None or float(left) > 0 for left in stock], dtype=bool)

    def leaf(self, row: int) -> str | None:
        """Return the last name of the item's category path, or None where it has no category."""
        path = self.categories[row]
        return path[-1] if path else None

    @cached_property
    def leaf_numbers(self) -> NDArray[np.int64] | None:
        """Number of each item's category leaf, or of its slot where no item has a category: (N,), -1 for none.

        None where items have neither.
        """
        names: Sequence[str | None] = [self.leaf(row) for row in range(len(self))]
        if not any(names):
            names = self.slots
        if not any(names):
            return None
        numbers = {name: number for number, name in enumerate(sorted({name for name in names if name}))}
        return np.array([numbers[name] if name else -1 for name in names], np.int64)

    def split_words(self, texts: Iterable[str]) -> list[str]:
        """Return texts with their words apart, read in the catalogue's language."""
        return split_all(texts, self.language)

    def texts(self, template: str = "{title}") -> list[str]:
        """Return one text per item, made from `template` over the item's fields, with whitespace normalised.

        Args:
            template: text with {title}, {category}, {leaf}, {slot}, {price}, {description} or any attribute; an
                unknown value becomes "", and a separator left over at either end goes.
        Raises:
            DataError: the template names a field that no item has, or cannot be read.
        """
        try:
            parsed = [field for field in string.Formatter().parse(template) if field[1] is not None]
        except ValueError as error:
            raise DataError(f"The text template {template!r} cannot be read: {error}.") from error
        known = (*_BUILT_IN_FIELDS, *self.attributes)
        for _, name, spec, conversion in parsed:
            if spec or conversion:
                raise DataError(f"The text template {template!r} formats {name!r}; write the name alone: {{{name}}}.")
            if name not in known:
                raise DataError(
                    f"The text template {template!r} names {name!r}, which these items do not have. "
                    f"Fields: {', '.join(known)}. {did_you_mean(name or '', known)}".rstrip()
                )
        columns = {name: self._text_column(name) for _, name, _, _ in parsed if name is not None}
        filled = (
            template.format(**{name: column[row] for name, column in columns.items()}) for row in range(len(self))
        )
        return [" ".join(text.split()).strip(" ,;:|>") for text in filled]

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Catalog:
        """Return the catalogue of these rows, in this order."""
        order = [int(row) for row in rows]
        taken = Catalog.build(
            item_ids=[self.item_ids[row] for row in order],
            titles=[self.titles[row] for row in order],
            categories=[self.categories[row] for row in order],
            slots=[self.slots[row] for row in order],
            prices=self.prices[order],
            descriptions=[self.descriptions[row] for row in order],
            attributes={name: [values[row] for row in order] for name, values in self.attributes.items()},
            pictures=[self.pictures[row] for row in order] if self.pictures else (),
        )
        return taken if self.language == "auto" else replace(taken, language=self.language)

    def _text_column(self, name: str) -> list[str]:
        match name:
            case "title":
                return list(self.titles)
            case "category":
                return [CATEGORY_SEPARATOR.join(path) for path in self.categories]
            case "leaf":
                return [path[-1] if path else "" for path in self.categories]
            case "slot":
                return [slot or "" for slot in self.slots]
            case "price":
                return ["" if np.isnan(price) else f"{price:.2f}" for price in self.prices]
            case "description":
                return list(self.descriptions)
            case _:
                return [value or "" for value in self.attributes[name]]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who took what, one row per event.

    Attributes:
        user_ids: outside ids of users, distinct; `users` holds places in it.
        users: (E,) int32; -1 where the user is unknown.
        items: (E,) int32 rows of the catalogue.
        weights: (E,) float32, rating or quantity; 1 where not given.
        times: (E,) float64 seconds since 1970-01-01 UTC; NaN where unknown.
        baskets: (E,) int64; equal numbers were taken together; -1 where unknown.
    """

    user_ids: tuple[str, ...]
    users: NDArray[np.int32]
    items: NDArray[np.int32]
    weights: NDArray[np.float32]
    times: NDArray[np.float64]
    baskets: NDArray[np.int64]

    @classmethod
    def build(
        cls,
        user_ids: Iterable[str],
        users: ArrayLike,
        items: ArrayLike,
        weights: ArrayLike | None = None,
        times: ArrayLike | None = None,
        baskets: ArrayLike | None = None,
    ) -> Self:
        """Make interactions, filling what is not given with "unknown".

        Raises:
            ValueError: a column has another length than `items`.
        """
        item_rows = np.asarray(items, dtype=np.int32)
        n = len(item_rows)
        interactions = cls(
            user_ids=tuple(user_ids),
            users=np.asarray(users, dtype=np.int32),
            items=item_rows,
            weights=np.ones(n, np.float32) if weights is None else np.asarray(weights, dtype=np.float32),
            times=np.full(n, np.nan) if times is None else np.asarray(times, dtype=np.float64),
            baskets=np.full(n, -1, np.int64) if baskets is None else np.asarray(baskets, dtype=np.int64),
        )
        for column in (interactions.users, interactions.weights, interactions.times, interactions.baskets):
            if len(column) != n:
                raise ValueError(f"{n} item rows but a column of {len(column)}")
        return interactions

    def list_taken(self, n_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the items of all users one after the other, a user's each once and latest first.

        Args:
            n_items: of the catalogue.
        Returns:
            (T,) rows of the catalogue, and (U + 1,) where each user's begin.
        """
        order = np.lexsort((-np.arange(len(self)), -np.nan_to_num(self.times), self.users))
        order = order[self.users[order] >= 0]
        users, items = self.users[order].astype(np.int64), self.items[order].astype(np.int64)
        _, first = np.unique(users * n_items + items, return_index=True)
        first.sort()
        return items[first], np.searchsorted(users[first], np.arange(len(self.user_ids) + 1))

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> Interactions:
        """Return the interactions of these rows; `user_ids` stays whole."""
        return replace(
            self, users=self.users[rows], items=self.items[rows], weights=self.weights[rows], times=self.times[rows],
            baskets=self.baskets[rows],
        )  # fmt: skip

    def to_csr(self, n_items: int, rows: NDArray[np.integer[Any]] | None = None) -> sparse.csr_matrix[Any]:
        """Return (U, N) float32: the summed weight of each user and item; rows without a user are left out.

        Args:
            n_items: N, the length of the catalogue.
            rows: the interactions to count, for example `Split.train_interactions`; None for all.
        """
        part = self if rows is None else self.take(rows)
        known = part.users >= 0
        matrix = sparse.coo_matrix(
            (part.weights[known], (part.users[known], part.items[known])), shape=(len(self.user_ids), n_items)
        ).tocsr()
        return sparse.csr_matrix(matrix, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Bundles:
    """Sets of items offered or bought together.

    Attributes:
        bundle_ids: outside ids, distinct.
        items: per bundle its distinct catalogue rows, in the order given.
        names: a name or intent; None where unknown.
        intents: what a bundle is for, in the words of who asks for it; where the data tells none, its name.
        owners: outside id of the user a bundle belongs to; None where unknown.
        times: (B,) float64 seconds since 1970-01-01 UTC; NaN where unknown.
        groups: what a split may not divide: the owner where known, else the bundle itself.
        baskets: (B,) int64 the basket of `Interactions.baskets` a bundle was made from; -1 for none.
    """

    bundle_ids: tuple[str, ...]
    items: tuple[NDArray[np.int32], ...]
    names: tuple[str | None, ...]
    owners: tuple[str | None, ...]
    times: NDArray[np.float64]
    groups: tuple[str, ...]
    baskets: NDArray[np.int64]
    intents: tuple[str | None, ...]

    @classmethod
    def build(
        cls,
        bundle_ids: Iterable[str],
        items: Iterable[ArrayLike],
        names: Iterable[str | None] | None = None,
        owners: Iterable[str | None] | None = None,
        times: ArrayLike | None = None,
        groups: Iterable[str] | None = None,
        baskets: ArrayLike | None = None,
        intents: Iterable[str | None] | None = None,
    ) -> Self:
        """Make bundles, filling what is not given with "unknown".

        Raises:
            ValueError: a column has another length than `bundle_ids`.
        """
        ids = tuple(bundle_ids)
        n = len(ids)
        owner_of = tuple(owners) if owners is not None else (None,) * n
        if groups is None:
            groups = [f"bundle:{ids[row]}" if owner is None else owner for row, owner in enumerate(owner_of)]
        name_of = tuple(names) if names is not None else (None,) * n
        bundles = cls(
            bundle_ids=ids,
            items=tuple(np.asarray(rows, dtype=np.int32) for rows in items),
            names=name_of,
            owners=owner_of,
            times=np.full(n, np.nan) if times is None else np.asarray(times, dtype=np.float64),
            groups=tuple(groups),
            baskets=np.full(n, -1, np.int64) if baskets is None else np.asarray(baskets, dtype=np.int64),
            intents=tuple(intents) if intents is not None else name_of,
        )
        for column in (
            bundles.items, bundles.names, bundles.times, bundles.groups, bundles.baskets, bundles.intents,
        ):  # fmt: skip
            if len(column) != n:
                raise ValueError(f"{n} bundles but a column of {len(column)}")
        return bundles

    def __len__(self) -> int:
        return len(self.bundle_ids)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(B,) the number of items of each bundle."""
        return np.array([len(rows) for rows in self.items], dtype=np.int64)

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Bundles:
        """Return the bundles of these rows, in this order."""
        order = [int(row) for row in rows]
        return Bundles(
            bundle_ids=tuple(self.bundle_ids[row] for row in order),
            items=tuple(self.items[row] for row in order),
            names=tuple(self.names[row] for row in order),
            owners=tuple(self.owners[row] for row in order),
            times=self.times[order],
            groups=tuple(self.groups[row] for row in order),
            baskets=self.baskets[order],
            intents=tuple(self.intents[row] for row in order),
        )

    def to_csr(
        self, n_items: int, rows: Sequence[int] | NDArray[np.integer[Any]] | None = None
    ) -> sparse.csr_matrix[Any]:
        """Return (B, N) float32 with a 1 for every item of every bundle, or of the bundles in `rows`."""
        chosen = self.items if rows is None else [self.items[int(row)] for row in rows]
        indptr = np.concatenate([[0], np.cumsum([len(members) for members in chosen])]).astype(np.int64)
        indices = np.concatenate([np.empty(0, np.int32), *chosen])
        matrix = sparse.csr_matrix(
            (np.ones(len(indices), np.float32), indices, indptr), shape=(len(chosen), n_items), dtype=np.float32
        )
        matrix.sort_indices()
        return matrix


@dataclass(frozen=True, eq=False)
class Dataset:
    """A catalogue with what is known of its use.

    Attributes:
        name: what it is called in reports.
        digest: sha256 over everything but what follows: equal digests mean equal data.
        notes: what was dropped or derived while reading, with counts.
        text_template: what makes the text of an item, see `Catalog.texts`; no part of the digest.
        sessions: None where the source has none; no scorer or adapter learns from them, see `data.sessions`.
        knowledge: rules and relations of its folder; None where it has none.
    """

    name: str
    catalog: Catalog
    interactions: Interactions | None
    bundles: Bundles
    digest: str
    notes: tuple[str, ...] = ()
    text_template: str = "{title}"
    sessions: Sessions | None = None
    knowledge: Knowledge | None = None

    @classmethod
    def build(
        cls,
        name: str,
        catalog: Catalog,
        interactions: Interactions | None,
        bundles: Bundles,
        notes: Iterable[str] = (),
        text: str = "{title}",
        sessions: Sessions | None = None,
    ) -> Self:
        """Make a dataset and compute its digest; `text` is the template of the items' texts, see `Catalog.texts`."""
        digest = compute_digest(catalog, interactions, bundles)
        return cls(name, catalog, interactions, bundles, digest, tuple(notes), text, sessions)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The text of each item.

        Raises:
            DataError: the template names a field that no item has, or cannot be read.
        """
        return tuple(self.catalog.texts(self.text_template))

    @property
    def plain_template(self) -> str:
        """The text template without category path: what words and the frozen encoder read beside the path."""
        return " ".join(self.text_template.replace("{category}", " ").split()) or self.text_template

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """The text of each item without its category path; see `texts` for errors."""
        return tuple(self.catalog.texts(self.plain_template))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The texts of `plain` with their words apart: see `peft_combo.data.language.split_words`."""
        return tuple(self.catalog.split_words(self.plain))

    @cached_property
    def described(self) -> tuple[str, ...] | None:
        """The text of each item with its category path behind it; None where no item has one."""
        if "{category}" in self.plain_template or not any(self.catalog.categories):
            return None
        return tuple(self.catalog.texts(self.plain_template + " {category}"))

    @property
    def read_frozen(self) -> list[tuple[str, ...]]:
        """What the frozen encoder reads: `plain` texts, and those of `described` that a category changes."""
        both = zip(self.described or (), self.plain, strict=False)
        changed = tuple(text for text, plain in both if text != plain)
        return [self.plain, changed] if changed else [self.plain]

    def find_items(self, items: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of items given by outside id, each once, in their order.

        Raises:
            DataError: an id is not of the catalogue.
        """
        index = self.catalog.index
        for item in items:
            if item not in index:
                close = did_you_mean(item, index)
                raise DataError(f'No item "{shorten(item)}" among the {len(index):,} of {self.name}. {close}'.rstrip())
        return np.array(list(dict.fromkeys(index[item] for item in items)), np.int64)

    def find_user(self, user: str) -> int:
        """Return the row of a user given by outside id.

        Raises:
            DataError: nobody of that id has an interaction.
        """
        if user not in self._user_rows:
            close = did_you_mean(user, self._user_rows)
            raise DataError(
                f'No user "{shorten(user)}" among the {len(self._user_rows):,} of {self.name}. {close}'.rstrip()
            )
        return self._user_rows[user]

    def knows_user(self, user: str) -> bool:
        """Say whether a user, given by outside id, has an interaction."""
        return user in self._user_rows

    @cached_property
    def _user_rows(self) -> dict[str, int]:
        return {} if self.interactions is None else {user: row for row, user in enumerate(self.interactions.user_ids)}
