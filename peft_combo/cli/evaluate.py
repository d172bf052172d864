"""`evaluate`: every scorer on the test bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import CacheOption, DataOption, JsonOption, RecipeOption, SetOption, StoreOption, app
from peft_combo.cli.shown import console_watch, print_json, print_table
from peft_combo.errors import DataError

if TYPE_CHECKING:
    from peft_combo.evaluation import Report


@app.command()
def evaluate(
    recipe: RecipeOption,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="fashion or fashion@v2; may be repeated.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a chart: .html, or .png with [plot].")] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: StoreOption = Path("adapters"),
    cache: CacheOption = Path("vectors"),
    as_json: JsonOption = False,
) -> None:
    """Measure completion of the test bundles, every baseline beside it: fitted on train, chosen on validation."""
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with console_watch() as watch:
        from peft_combo.adapters import AdapterStore
        from peft_combo.backbone import Backbone
        from peft_combo.bank import AdapterBank
        from peft_combo.categories import Areas, split_problem
        from peft_combo.data import open_dataset, split_as
        from peft_combo.evaluation import evaluate as run
        from peft_combo.evaluation import plot
        from peft_combo.vectors import VectorCache

        config = loaded.data
        dataset = open_dataset(config)
        parts = split_as(dataset, config)
        opened = AdapterStore(store)
        for reference in adapters or ():
            manifest = opened.open(reference).manifest
            if problem := split_problem(manifest, parts, config):
                raise DataError(problem)
            if manifest.imported is not None:
                watch.note(f"{reference} was imported: whether it has learned from these test bundles is not known.")
        bank, kept, texts = (
            AdapterBank(Backbone.of(loaded.backbone), opened),
            VectorCache(cache),
            dataset.catalog.texts(config.text),
        )
        watch.stage("Encoding the catalogue", len(texts) * (1 + len(adapters or ())))
        frozen = kept.vectors(bank, texts, None, watch.advance)
        tuned = {
            reference: (kept.vectors(bank, texts, reference, watch.advance), bank.get(reference).head)
            for reference in adapters or ()
        }
        recipes = {reference: bank.get(reference).record.manifest.recipe for reference in adapters or ()}
        report = run(
            dataset, parts, frozen=frozen, tuned=tuned, areas=Areas.of(dataset.catalog, recipes), text=config.text,
            seed=loaded.seed, advance=lambda name: watch.note(f"measured {name}"),
        )  # fmt: skip
    if plot_file is not None:
        plot(report, plot_file)
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    counts = report.counts
    print(
        f"{report.dataset}: {counts['test questions']:,} questions from {counts['test bundles']:,} test bundles, "
        f"{counts['items']:,} items; split {report.split_digest[:12]}"
    )
    slices = [
        name
        for name in report.lines[0].slices
        if name in ("warm target", "cold target", "same-leaf", "cross-leaf", "cross-category")
    ]
    peers = sorted({name for line in report.lines for name in line.p})
    print_table(
        ("", "R@1", "R@10", "R@20", "NDCG@10", "95 % interval", "MRR", *(f"p: {peer}" for peer in peers), *slices),
        [
            (
                line.name,
                *(f"{line.values[name]:.3f}" for name in ("r@1", "r@10", "r@20", "ndcg@10")),
                "{:.3f} to {:.3f}".format(*line.intervals["ndcg@10"]),
                f"{line.values['mrr']:.3f}",
                *(f"{line.p[peer]:.4f}" if peer in line.p else "" for peer in peers),
                *(f"{line.slices[name].ndcg:.3f}" if name in line.slices else "" for name in slices),
            )
            for line in report.lines
        ],
        numbers=True,
    )
    print(f"The fusion chosen on validation: {report.fusion.chosen}. Slices show NDCG@10. {report.protocol}")
    for note in report.notes:
        print(f"Note: {note}")
