"""`uplift` command: what offering a bundle changed, from a table of offers or the campaigns of the Complete Journey."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import JsonOption, app
from peft_combo.cli.output import print_json, print_line, print_table
from peft_combo.errors import DataError

if TYPE_CHECKING:
    from peft_combo.metrics.uplift import Effect, Uplift


@app.command(short_help="Estimate what offering a bundle adds to an outcome.")
def uplift(
    table: Annotated[
        Path | None,
        typer.Argument(
            help="Table of unit, offered (0 or 1), outcome, perhaps bundle, and numbers known before.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="completejourney: coupon campaigns of that package in place of a table."),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="With --source: baskets with two products of the set, and not spend on it.")
    ] = False,
    placebo: Annotated[
        bool, typer.Option("--placebo", help="With --source: the four weeks before a campaign, which it cannot move.")
    ] = False,
    trim: Annotated[
        float, typer.Option("--trim", min=0, max=0.4, help="Propensities nearer to 0 or 1 than this are left out.")
    ] = 0.02,
    as_json: JsonOption = False,
) -> None:
    """Estimate what offering a bundle adds to an outcome, beside selling its items alone: doubly robust, with interval.

    Right where the covariates say all by which those with and without the offer differ; how strong something left out
    would have to be is told by the E-value.
    """
    if (table is None) == (source is None):
        raise DataError("Expected a table of offers or --source completejourney, one of them.")
    if source not in (None, "completejourney"):
        raise DataError(f'--source: expected completejourney, found "{source}".')
    if table is not None and (joint or placebo):
        raise DataError("--joint and --placebo are for --source; a table holds one outcome. Leave them out.")
    from peft_combo.data.offers import read_campaigns, read_offers
    from peft_combo.files import literal_path
    from peft_combo.metrics.uplift import estimate_uplift

    offers = read_campaigns(joint=joint, placebo=placebo) if table is None else read_offers(literal_path(table))
    try:
        found = estimate_uplift(
            offers.outcomes, offers.offered, offers.covariates, offers.units, names=offers.names,
            segments=offers.bundles, trim=trim,
        )  # fmt: skip
    except ValueError as error:
        raise DataError(str(error)) from error
    (print_json(asdict(found)) if as_json else _print_uplift(found))


def _print_uplift(found: Uplift) -> None:
    print_line(
        f"{found.rows:,} rows of {found.units:,} units; without the offer the mean would be {found.without:.4g}."
    )
    print_table(
        ("effect of the offer", "per row", "95 %"),
        [("doubly robust", *_format(found.effect)), ("naive difference", *_format(found.naive))],
    )
    print_line(
        f"E-value {found.e_value[0]:.2f}, of the interval's end near 0 {found.e_value[1]:.2f}: so strongly would "
        "something unmeasured have to go with both the offer and the outcome to explain it away."
    )
    if found.slope is not None:
        says = (
            "covariates foretell who gains" if found.slope.interval[0] > 0 else "covariates do not foretell who gains"
        )
        print_line(f"{says}: slope {found.slope.value:.2f}, {_format(found.slope)[1]}.")
    if found.segments:
        rows = [(one.name, one.rows, *_format(one.effect), *_format(one.shrunk)) for one in found.segments]
        print_table(("bundle", "rows", "alone", "95 %", "shrunk", "95 %"), rows)
    bins = [(f"{low:.1f} to {high:.1f}", none, some) for low, high, none, some in found.overlap.bins if none + some]
    print_table(("propensity", "without", "with"), bins)
    gaps = [(name, f"{a:+.3f}", f"{b:+.3f}") for name, (a, b) in found.overlap.gaps.items()]
    print_table(("gap of means, in deviations", "as it is", "weighted"), gaps)
    print_line(f"{found.overlap.trimmed:.1%} of the rows were trimmed.")
    for doubt in found.doubts:
        print_line(f"doubt: {doubt}")
    print_line("not identified: what is in no covariate and moves both, and offers that move others than who got them.")


def _format(effect: Effect) -> tuple[str, str]:
    return f"{effect.value:+.4g}", f"{effect.interval[0]:+.4g} to {effect.interval[1]:+.4g}"
