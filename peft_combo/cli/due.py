"""`due` command: who takes what again by a date, from interactions with times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo.cli.app import DataOption, JsonOption, RecipeOption, SetOption, app, load_ready_recipe
from peft_combo.cli.output import console_watch, print_json, print_line, print_table
from peft_combo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from peft_combo.data.model import Catalog, Dataset
    from peft_combo.evaluation.repurchase import RepurchaseReport, RepurchaseRow
    from peft_combo.recommender.repurchase import PurchaseHistory

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEAD = ("user", "what", "last", "times", "expected", "chance")


@app.command(short_help="List who is likely to take what again by a date.")
def due(
    recipe: RecipeOption,
    by: Annotated[
        str | None, typer.Option("--by", help="Last day that counts, as in 2024-06-30; default 14 days from --at on.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Day it is asked on; default the one after the latest purchase.")
    ] = None,
    of: Annotated[str, typer.Option("--of", help="What is taken again: item, or category (its leaf).")] = "item",
    user: Annotated[str | None, typer.Option("--user", help="Id of one user; default all.")] = None,
    least: Annotated[float, typer.Option("--least", min=0, max=1, help="Least chance that is shown.")] = 0.0,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Rows of the table.")] = 20,
    to: Annotated[Path | None, typer.Option("--to", help="CSV to write, with every row and not only -k.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="How right it is on the latest fifth of the time, in place of a list.")
    ] = False,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List which customers are likely to take what again by a date, from interactions with user_id and timestamp.

    Learned from all histories: how often the thing and the pair come back, how long ago the last purchase was, and
    whether the customer still comes. With --check, what that is worth on your data, beside mean gaps.
    """
    if of not in ("item", "category"):
        raise DataError(f'--of: expected item or category, found "{of}".')
    loaded = load_ready_recipe(recipe, overrides, data)
    with console_watch() as callback:
        from peft_combo.recommender.repurchase import PurchaseHistory, RepurchaseModel
        from peft_combo.recommender.workspace import Workspace

        dataset = Workspace.of(loaded, needs="interactions", on_note=callback.on_note).dataset
        history = PurchaseHistory.of(_need_interactions(dataset), _number_things(dataset.catalog, of))
        if check:
            from peft_combo.evaluation.repurchase import measure_repurchase

            report = measure_repurchase(history)
            (print_json(report.to_json()) if as_json else _print_report(report))
            return
        if user is not None:
            dataset.find_user(user)
        day = float(history.days.max()) + 1 if at is None else _read_day(at, "--at")
        last = day + 13 if by is None else _read_day(by, "--by")
        if last < day:
            raise DataError(f"--by: expected {_name_day(day)} or later, found {_name_day(last)}.")
        model = RepurchaseModel.fit(history, day)
        rows = _list_due(model, history, dataset, day, last, of, user, least)
    if to is not None:
        _write_csv(to, rows)
    if as_json:
        print_json(rows if to is None else rows[:k])
        return
    print_line(f"Chance of a purchase from {_name_day(day)} to {_name_day(last)}; expected: as likely by then as not.")
    print_table(_HEAD, [(*list(row.values())[:5], f"{row['chance']:.3f}") for row in rows[:k]])
    if to is not None:
        print_line(f"{len(rows):,} rows are in {to}.")


def _need_interactions(dataset: Dataset) -> Any:
    if dataset.interactions is None:
        raise DataError(f"{dataset.name!r} has no interactions. Add a table with user_id, item_id and timestamp.")
    return dataset.interactions


def _number_things(catalog: Catalog, of: str) -> NDArray[np.int64]:
    import numpy as np

    if of == "item":
        return np.arange(len(catalog))
    leaves = catalog.leaf_numbers
    if leaves is None:
        raise DataError("--of category: the items have no category. Add the column, or ask with --of item.")
    return leaves


def _list_due(
    model: Any, history: PurchaseHistory, dataset: Dataset, day: float, last: float, of: str, user: str | None,
    least: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row for each pair that is likely enough, the likeliest first."""
    import numpy as np

    pairs = model.predict(history, day)
    chances, medians = pairs.within(last - day + 1), pairs.median()
    assert dataset.interactions is not None
    ids, catalog = dataset.interactions.user_ids, dataset.catalog
    names = list(catalog.item_ids)
    if of == "category":
        leaves = catalog.leaf_numbers
        assert leaves is not None
        found = {int(number): catalog.leaf(row) or catalog.slots[row] or "" for row, number in enumerate(leaves)}
        names = [found.get(number, "") for number in range(int(leaves.max()) + 1)]
    wanted = chances >= least
    if user is not None:
        wanted &= pairs.users == ids.index(user)
    order = np.flatnonzero(wanted)
    order = order[np.lexsort((order, -chances[order]))]
    return [
        {
            "user": ids[pairs.users[row]], "what": names[pairs.things[row]], "last": _name_day(pairs.last[row]),
            "times": int(pairs.counts[row]),
            "expected": _name_day(day + medians[row] - 1) if np.isfinite(medians[row]) else "",
            "chance": round(float(chances[row]), 4),
        }
        for row in order.tolist()
    ]  # fmt: skip


def _write_csv(target: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from peft_combo.files import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, _HEAD, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_text(target, text.getvalue())
    except OSError as error:
        raise DataError(f"The list cannot be written to {target}: {error.strerror or error}.") from error


def _read_day(text: str, option: str) -> float:
    try:
        return float((datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) - _EPOCH).days)
    except ValueError as error:
        raise DataError(f'{option}: expected a day such as 2024-06-30, found "{text}".') from error


def _name_day(day: float) -> str:
    return (_EPOCH + timedelta(days=float(day))).strftime("%Y-%m-%d")


def _print_report(report: RepurchaseReport) -> None:
    print_line(
        f"{report.pairs:,} pairs, {report.repeated:,} of them taken twice or more, watched for {report.watched:.0f} "
        f"days; {report.share:.2%} were taken again within {report.horizons[1]:.0f} days."
    )
    for what, rows in (("all pairs", report.every), ("taken twice or more", report.often)):
        head = (what, "concordance", f"Brier {report.horizons[1]:.0f} d", "Brier, mean", "mean chance", "days off")
        print_table(head, [_format_row(row) for row in rows], numbers=True)


def _format_row(row: RepurchaseRow) -> tuple[str, ...]:
    values = (row.concordance, row.brier, row.integrated_brier, row.mean_chance)
    return (row.name, *(f"{value:.4f}" for value in values), f"{row.error:.1f}")
