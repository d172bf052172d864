"""What use leaves to learn from: bundles people put together, and lists they were shown with what became of them.

Owns these two as values, the data folder made of the first, and the log file of the second. Knows nothing of who
gathered them: users are keys here, never outside ids.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_combo.data.model import Catalog
from peft_combo.data.splits import find_parts
from peft_combo.errors import DataError
from peft_combo.files import stage_folder
from peft_combo.recipe.model import DataConfig


@dataclass(frozen=True)
class UseBundle:
    """Items somebody took together.

    Attributes:
        user: key of the person; None where nobody is known. time: of the last item, seconds since 1970.
    """

    bundle_id: str
    user: str | None
    items: tuple[str, ...]
    time: float


@dataclass(frozen=True)
class LoggedList:
    """A list that was shown, and what was earned at each place.

    Attributes:
        user: key of the person; None for a visitor. version: the adapter that answered. arm: prod, next.
        context: items that were given. items: what was shown, first place first.
        propensities: of each item at its place given those before it; None where lists were not drawn.
        scores: of each item. rewards: of each item, 1 for a click, a basket or a purchase.
    """

    request_id: str
    user: str | None
    version: str
    arm: str
    context: tuple[str, ...]
    items: tuple[str, ...]
    propensities: tuple[float, ...] | None
    scores: tuple[float, ...] | None
    rewards: tuple[float, ...]
    time: float = 0.0

    @property
    def group(self) -> str:
        """What an interval draws as a whole: the person, else the request."""
        return self.user or f"request {self.request_id}"


def write_bundles(
    folder: Path, bundles: Sequence[UseBundle], catalog: Catalog, added: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, str], config: DataConfig,
) -> tuple[list[UseBundle], list[str]]:  # fmt: skip
    """Write bundles of use as a data folder that `tune --new-data` takes.

    A person of the recipe's own data comes again under a key. Where key and own id fall into different parts of the
    split, nothing of them is written: else one would be learned from and the other asked.

    Args:
        catalog: the recipe's items. added: items that came later, id -> fields (title, category, ...).
        known: key -> id in the recipe's data, of everybody there.
        config: of the recipe, for its split.
    Returns:
        the bundles that were written, and what was left out in words.
    """
    told: list[str] = []
    kept = [one for one in bundles if all(item in added or item in catalog.index for item in one.items)]
    if len(kept) < len(bundles):
        told.append(f"{len(bundles) - len(kept):,} bundles hold items that are no longer there, and were left out")
    if config.split in ("user", "cold-item"):
        again = [one for one in kept if one.user in known]
        keys = [one.user or "" for one in again]
        apart = find_parts(keys, config) != find_parts([known[key] for key in keys], config)
        gone = {one.bundle_id for one, other in zip(again, apart, strict=True) if other}
        if gone:
            told.append(
                f"{len(gone):,} bundles of people known before were left out, since their keys fall into another part "
                "of the split"
            )
            kept = [one for one in kept if one.bundle_id not in gone]
    used = dict.fromkeys(item for one in kept for item in one.items)
    with stage_folder(folder, replace=True) as staged:
        header, rows = _describe_items(tuple(used), catalog, added)
        mapping = config.columns.get("items", {})
        _write_table(staged.path / "items.csv", [mapping.get(name, name) for name in header], rows)
        members = [(one.bundle_id, item) for one in kept for item in one.items]
        _write_table(staged.path / "bundles.csv", ("bundle_id", "item_id"), members)
        meta = [(one.bundle_id, one.user or "", f"{one.time:.3f}") for one in kept]
        _write_table(staged.path / "bundle_meta.csv", ("bundle_id", "user_id", "timestamp"), meta)
    return kept, told


def _describe_items(
    items: Sequence[str], catalog: Catalog, added: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of items, with the newest word on each: what was put later goes before the catalogue."""
    header = ["item_id", "title", "category", "slot", "price", "description", *catalog.attributes]
    rows = []
    for item in items:
        own: dict[str, Any] = {}
        if item in catalog.index:
            row = catalog.index[item]
            price = float(catalog.prices[row])
            own = {
                "title": catalog.titles[row], "category": " > ".join(catalog.categories[row]),
                "slot": catalog.slots[row], "price": None if np.isnan(price) else f"{price:g}",
                "description": catalog.descriptions[row],
                **{name: values[row] for name, values in catalog.attributes.items()},
            }  # fmt: skip
        own |= {name: value for name, value in added.get(item, {}).items() if name in header}
        rows.append([item, *("" if own.get(name) is None else str(own[name]) for name in header[1:])])
    return header, rows


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_log(path: Path, lists: Sequence[LoggedList]) -> None:
    """Write logged lists, a JSON object on each line."""
    path.write_text("".join(json.dumps(asdict(one), allow_nan=False) + "\n" for one in lists), encoding="utf-8")


def read_log(path: Path) -> list[LoggedList]:
    """Read logged lists, a JSON object with the fields of `LoggedList` on each line.

    Raises:
        DataError: the file cannot be read, or a line is none such; the first that is not is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The log {path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_parse_list(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}, line {number}: expected one shown list as a JSON object with request_id, user, version, "
                    f"arm, context, items, propensities, scores and rewards; {type(error).__name__}: {error}."
                ) from error
    return found


def _parse_list(given: Mapping[str, Any]) -> LoggedList:
    items = tuple(map(str, given["items"]))

    def read_numbers(name: str) -> tuple[float, ...]:
        numbers = tuple(float(one) for one in given[name])
        if len(numbers) != len(items) or not np.all(np.isfinite(numbers)):
            raise ValueError(f"{name} must hold {len(items)} numbers, one for each item")
        return numbers

    propensities = None if given.get("propensities") is None else read_numbers("propensities")
    if propensities is not None and not all(0 < one <= 1 for one in propensities):
        raise ValueError("propensities must lie in (0, 1]")
    return LoggedList(
        str(given["request_id"]), None if given.get("user") is None else str(given["user"]), str(given["version"]),
        str(given.get("arm", "prod")), tuple(map(str, given.get("context", ()))), items, propensities,
        None if given.get("scores") is None else read_numbers("scores"), read_numbers("rewards"),
        float(given.get("time", 0.0)),
    )  # fmt: skip
