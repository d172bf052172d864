"""Reader of the BundleRec datasets (clothing, electronic, food) in their CSV layout.

Owns their file names, columns and quirks. Knows nothing of other layouts.
Source: https://github.com/BundleRec/bundle_recommendation (Sun et al., SIGIR 2022).

Every bundle belongs to a user, and user_item is the union of that user's bundles: it must not be shown for a held-out
user, which `splits` sees to. The session files, which may be absent, say of which items each bundle was made.
"""

from __future__ import annotations

import html
import re
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from peft_combo.data.assemble import Found
from peft_combo.data.model import Bundles, Catalog, Interactions
from peft_combo.data.readers.csv_table import SHOWN_FAULTS, BrokenRecord, csv_records
from peft_combo.data.readers.times import recognise
from peft_combo.data.sessions import Sessions
from peft_combo.errors import Fault, did_you_mean

FILES: dict[str, tuple[str, ...]] = {
    "item_titles.csv": ("item ID", "titles"),
    "item_categories.csv": ("item ID", "categories"),
    "bundle_item.csv": ("bundle ID", "item ID"),
    "bundle_intent.csv": ("bundle ID", "intent"),
    "user_bundle.csv": ("user ID", "bundle ID", "timestamp"),
    "user_item.csv": ("user ID", "item ID", "timestamp"),
}
SESSION_FILES: dict[str, tuple[str, ...]] = {
    "session_item.csv": ("session ID", "item ID"),
    "session_bundle.csv": ("session ID", "bundle ID"),
    "user_session.csv": ("user ID", "session ID"),
}

_Row = tuple[int, tuple[str, ...]]


def read_bundlerec(folder: Path) -> tuple[Found | None, list[Fault]]:
    """Read a folder of BundleRec CSV files.

    Returns:
        (found, faults); found is None where there are faults.
    """
    faults: list[Fault] = []
    notes: list[str] = []
    rows = {name: _read(folder / name, columns, faults, notes) for name, columns in FILES.items()}
    with_sessions = any((folder / name).exists() for name in SESSION_FILES)
    if with_sessions:
        rows |= {name: _read(folder / name, columns, faults, notes) for name, columns in SESSION_FILES.items()}
    if faults:
        return None, faults

    titles = {item_id: _title(title) for _, (item_id, title) in rows["item_titles.csv"] if _title(title)}
    if not titles:
        return None, [Fault("item_titles.csv", "no item has a title.")]
    categories = {item_id: longest_path(cell) for _, (item_id, cell) in rows["item_categories.csv"]}
    catalog = Catalog.build(titles, titles.values(), [categories.get(item_id, ()) for item_id in titles])

    untitled: set[str] = set()
    members: dict[str, dict[int, None]] = defaultdict(dict)
    for _, (bundle_id, item_id) in rows["bundle_item.csv"]:
        if item_id in titles:
            members[bundle_id][catalog.index[item_id]] = None
        else:
            untitled.add(item_id)
    owners: dict[str, tuple[str, float]] = {}
    shared = 0
    moments = _moments(rows["user_bundle.csv"], "user_bundle.csv", faults, notes)
    for (_, (user, bundle_id, _)), moment in zip(rows["user_bundle.csv"], moments, strict=True):
        if bundle_id in owners:
            shared += 1
        else:
            owners[bundle_id] = (user, moment)
    if shared:
        notes.append(f"{shared:,} bundles have a second user; the first one counts as the owner")
    intents = {bundle_id: " ".join(intent.split()) for _, (bundle_id, intent) in rows["bundle_intent.csv"]}
    bundles = Bundles.build(
        bundle_ids=members,
        items=[list(items) for items in members.values()],
        names=[intents.get(bundle_id) or None for bundle_id in members],
        owners=[owners[bundle_id][0] if bundle_id in owners else None for bundle_id in members],
        times=[owners[bundle_id][1] if bundle_id in owners else np.nan for bundle_id in members],
    )

    place: dict[str, int] = {}
    events: list[tuple[int, int, float]] = []
    moments = _moments(rows["user_item.csv"], "user_item.csv", faults, notes)
    for (_, (user, item_id, _)), moment in zip(rows["user_item.csv"], moments, strict=True):
        if item_id in titles:
            events.append((place.setdefault(user, len(place)), catalog.index[item_id], moment))
        else:
            untitled.add(item_id)
    if untitled:
        notes.append(f"{len(untitled):,} items without a title were left out of bundles and interactions")
    if faults:
        return None, faults
    interactions = Interactions.build(
        user_ids=place,
        users=[user for user, _, _ in events],
        items=[item for _, item, _ in events],
        times=[moment for _, _, moment in events],
    )
    sessions = _build_sessions(rows, catalog) if with_sessions else None
    name = f"bundlerec-{folder.resolve().name}"
    return Found(name, catalog, interactions, (), bundles, tuple(notes), "bundle_item.csv", sessions), []


def _build_sessions(rows: dict[str, list[_Row]], catalog: Catalog) -> Sessions:
    """Join the session files; items without a title are in no catalogue, so they are in no session either."""
    items: dict[str, dict[int, None]] = defaultdict(dict)
    for _, (session_id, item_id) in rows["session_item.csv"]:
        own = items[session_id]
        if item_id in catalog.index:
            own[catalog.index[item_id]] = None
    made: dict[str, dict[str, None]] = defaultdict(dict)
    for _, (session_id, bundle_id) in rows["session_bundle.csv"]:
        made[session_id][bundle_id] = None
    owners = {session_id: user for _, (user, session_id) in rows["user_session.csv"]}
    return Sessions(
        session_ids=tuple(items),
        items=tuple(np.array(list(own), np.int32) for own in items.values()),
        bundle_ids=tuple(tuple(made[session_id]) for session_id in items),
        owners=tuple(owners.get(session_id) for session_id in items),
    )


def longest_path(cell: str) -> tuple[str, ...]:
    """Return the deepest category path of a cell like ``[[Toys,Arts, Crafts & Sewing],[Home]]``, the first of equals.

    Names are not quoted and may hold commas. A comma inside a name is followed by a space, one between names is not:
    checked on clothing and electronic, where this gives names with commas such as "Surf, Skate & Street" and no other.
    """
    inner = cell.strip().removeprefix("[[").removesuffix("]]")
    paths = [tuple(name for one in re.split(r",(?! )", path) if (name := one.strip())) for path in inner.split("],[")]
    return max(paths, key=len)


def _title(cell: str) -> str:
    """Return a title without the HTML entities (some are escaped twice) and stray whitespace of the source."""
    return " ".join(html.unescape(html.unescape(cell)).split())


def _read(file: Path, columns: tuple[str, ...], faults: list[Fault], notes: list[str]) -> list[_Row]:
    """Return (line, cells) of the named columns, cells stripped."""
    if not file.is_file():
        faults.append(
            Fault(
                file.name,
                f"is missing in {file.parent}.",
                "Get all of them with: peft-combo data get bundlerec-clothing",
            )
        )
        return []
    try:
        raw = file.read_bytes()
    except OSError as error:
        faults.append(Fault(file.name, f"cannot be read: {error.strerror or error}."))
        return []
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        notes.append(f"{file.name} is not UTF-8 and was read as cp1252")
    records = csv_records(text)
    rows: list[_Row] = []
    try:
        header = [name.strip() for name in next(records, (1, []))[1]]
        missing = [name for name in columns if name not in header]
        for name in missing:
            problem = f"has no column {name!r}; it has {', '.join(header)}."
            faults.append(Fault(f"{file.name}:1", problem, did_you_mean(name, header)))
        if missing:
            return []
        places = [header.index(name) for name in columns]
        for line, cells in records:
            if len(cells) == len(header):
                rows.append((line, tuple(cells[place].strip() for place in places)))
            else:
                faults.append(Fault(f"{file.name}:{line}", f"has {len(cells)} columns, not {len(header)}."))
    except BrokenRecord as broken:
        faults.append(Fault(f"{file.name}:{broken.line}", f"cannot be read as CSV: {broken}.", "Check the quotes."))
        return []
    if not rows:
        faults.append(Fault(file.name, "has no rows."))
    return rows


def _moments(rows: list[_Row], file: str, faults: list[Fault], notes: list[str]) -> list[float]:
    """Return the seconds that the last cell of each row holds, NaN where it is empty."""
    values = np.full(len(rows), np.nan)
    for place, (line, cells) in enumerate(rows):
        try:
            values[place] = float(cells[-1]) if cells[-1] else np.nan
        except ValueError:
            values[place] = np.inf
        if np.isinf(values[place]):
            values[place] = np.nan
            faults.append(Fault(f"{file}:{line}", f"timestamp is {cells[-1]!r}, expected seconds since 1970."))
    found = recognise(values, time.time())
    for place in np.flatnonzero(found.misfits)[:SHOWN_FAULTS]:
        line, cells = rows[place]
        expected = found.words or "seconds since 1970"
        faults.append(Fault(f"{file}:{line}", f"timestamp is {cells[-1]!r}, expected {expected}."))
    if found.note:
        notes.append(f"{file}: timestamp {found.note}")
    seconds: list[float] = found.seconds.tolist()
    return seconds
