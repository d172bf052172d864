"""The command line: words in, library calls, tables out.

Results go to stdout (a table, or JSON with ``--json``), progress and notes to stderr. Imports of everything heavy stand
inside the commands, so that ``--help`` and the recipe commands answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo import __version__
from peft_combo.errors import DataError, Fault, PeftComboError, StoreError
from peft_combo.watch import Watch

if TYPE_CHECKING:
    from peft_combo.evaluation import Report
    from peft_combo.recipe import Recipe
    from peft_combo.recommender import BundleRecommender, Recommendation, Suggestion
    from peft_combo.tuning import Plan, TuneResult

app = typer.Typer(
    help="Per-category adapters for BERT-like encoders, and the bundle recommender that swaps them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Recipes: list, show, copy, check, schema.", no_args_is_help=True)
adapters_app = typer.Typer(help="Stored adapters: list, show, verify, remove.", no_args_is_help=True)
data_app = typer.Typer(help="Data: list, check, stats, get.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key: --set training.epochs=2. May be repeated.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder with your data, instead of the recipe's.")]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the adapter store.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder that keeps encoded catalogues.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"peft-combo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def tune(
    recipe: RecipeOption,
    data: DataOption = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this recipe.")] = False,
    run_folder: Annotated[
        Path | None, typer.Option("--run-folder", help="Checkpoints and loss log; default runs/<recipe>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tune one category's adapter and store it, with quality before and after."""
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with _console_watch() as watch:
        watch.note(f"Loading {loaded.backbone.model} ...")
        from peft_combo.tuning import Interrupted
        from peft_combo.tuning import tune as run

        try:
            result = run(loaded, resume=resume, run_folder=run_folder, watch=watch)
        except Interrupted as error:
            watch.close()
            if watch.main:
                print(error, file=sys.stderr)
            raise typer.Exit(130) from None
    if not watch.main:
        return
    if as_json:
        _print_json(_tune_json(result))
    else:
        _print_tuned(result, loaded)


@app.command()
def embed(
    recipe: RecipeOption,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="fashion or fashion@v2; without it the frozen encoder.")
    ] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: StoreOption = Path("adapters"),
    cache: CacheOption = Path("vectors"),
) -> None:
    """Encode a catalogue once; under `accelerate launch` each process takes a share."""
    import os

    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with _console_watch() as watch:
        from peft_combo.adapters import AdapterStore
        from peft_combo.backbone import Backbone
        from peft_combo.bank import AdapterBank
        from peft_combo.data import open_dataset
        from peft_combo.vectors import embed as run

        texts = open_dataset(loaded.data).catalog.texts(loaded.data.text)
        backbone = Backbone.of(loaded.backbone)
        process, processes = _rank(), int(os.environ.get("WORLD_SIZE", "1"))
        watch.stage("Encoding the catalogue", len(set(texts)) // processes)
        count = run(
            AdapterBank(backbone, AdapterStore(store)), texts, adapter, cache,
            process=process, processes=processes, progress=watch.advance,
        )  # fmt: skip
    if watch.main:
        whose = adapter or "the frozen encoder"
        print(f"{len(texts):,} items of {loaded.name} in {cache} for {whose}; {count:,} encoded now")


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
    with _console_watch() as watch:
        from peft_combo.adapters import AdapterStore
        from peft_combo.backbone import Backbone
        from peft_combo.bank import AdapterBank
        from peft_combo.data import open_dataset, split_as
        from peft_combo.evaluation import evaluate as run
        from peft_combo.evaluation import plot
        from peft_combo.vectors import VectorCache

        config = loaded.data
        dataset = open_dataset(config)
        parts = split_as(dataset, config)
        opened = AdapterStore(store)
        for reference in adapters or ():
            stamp = opened.open(reference).manifest.data
            if stamp.split_digest != parts.digest:
                raise DataError(
                    f"Adapter {reference} was tuned on another split of {stamp.name} ({stamp.split_digest[:12]}, here "
                    f"{parts.digest[:12]}), so it may have learned from these test bundles. Evaluate it with the data "
                    "and the recipe it was tuned with."
                )
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
        report = run(
            dataset, parts, frozen=frozen, tuned=tuned, text=config.text, seed=loaded.seed,
            advance=lambda name: watch.note(f"measured {name}"),
        )  # fmt: skip
    if plot_file is not None:
        plot(report, plot_file)
    if as_json:
        _print_json(report.to_json())
    else:
        _print_report(report)


@app.command()
def recommend(
    recipe: RecipeOption,
    items: Annotated[str | None, typer.Option("--items", help="Item ids every bundle holds: F1,F7.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="User id; with it the bundles suit that user.")] = None,
    query: Annotated[str | None, typer.Option("--query", help="What is looked for, in words.")] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="fashion or fashion@v2; default: the recipe's category.")
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="No adapter: the frozen encoder.")] = False,
    single: Annotated[bool, typer.Option("--single", help="Single items that complete, instead of bundles.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many.")] = 5,
    slots: Annotated[str | None, typer.Option("--slots", help="Slots every bundle must have: top,shoes.")] = None,
    without_slots: Annotated[str | None, typer.Option("--without-slots", help="Slots no new item may have.")] = None,
    budget: Annotated[float | None, typer.Option("--budget", min=0, help="Most a bundle may cost.")] = None,
    max_price: Annotated[float | None, typer.Option("--max-price", min=0, help="Most a new item may cost.")] = None,
    season: Annotated[str | None, typer.Option("--season", help="Season of new items.")] = None,
    category: Annotated[list[str] | None, typer.Option("--category", help='Only under this path: "A > B".')] = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Items in a bundle.")] = None,
    in_stock: Annotated[bool, typer.Option("--in-stock", help="Only items of which some are left.")] = False,
    diversity: Annotated[float, typer.Option("--diversity", min=0, max=1, help="0 the best, 1 the most varied.")] = 0.3,
    substitute: Annotated[bool, typer.Option("--substitute", help="Replace like by like, not complete.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say from what evidence.")] = False,
    data: DataOption = None,
    overrides: SetOption = None,
    store: StoreOption = Path("adapters"),
    cache: CacheOption = Path("vectors"),
    as_json: JsonOption = False,
) -> None:
    """Recommend bundles, or single items, for items, a user or a text."""
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with _console_watch() as watch:
        from peft_combo.composing import Options
        from peft_combo.constraints import Constraints

        fitted = _recommender(loaded, None if frozen else adapter or loaded.category, store, cache, watch)
    constraints = Constraints(
        budget=budget, price_max=max_price, in_stock=in_stock, season=season, categories=tuple(category or ()),
        size=None if size is None else (size, size),
    )  # fmt: skip
    given = _words(items) or ()
    if single:
        suggestions = fitted.complete(given, user=user, k=k, constraints=constraints)
        if as_json:
            _print_json([asdict(one) for one in suggestions])
        else:
            _print_suggestions(suggestions, explain)
        return
    bundles = fitted.compose(
        given, user=user, query=query, constraints=constraints, required=_words(slots), forbidden=_words(without_slots),
        options=Options(k=k, diversity=diversity, mode="substitute" if substitute else "complement"),
    )  # fmt: skip
    if as_json:
        _print_json([asdict(one) for one in bundles])
    else:
        _print_bundles(bundles, explain)


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """List the shipped recipes."""
    from peft_combo.recipe_files import list_recipes

    found = list_recipes()
    if as_json:
        _print_json([recipe._asdict() for recipe in found])
    else:
        _print_table(("recipe", "category", "method", "what it does"), found)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With parents merged and every default filled in, as JSON.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Print a recipe as it is written, or complete."""
    from peft_combo.recipe_files import load_recipe, recipe_text

    if resolved or overrides:
        _print_json(load_recipe(name, tuple(overrides or ())).model_dump(mode="json"))
    else:
        print(recipe_text(name), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Copy a recipe, to make it your own."""
    from peft_combo.recipe_files import copy_recipe

    print(copy_recipe(name, destination, force=force))


@recipes_app.command("check")
def recipes_check(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    overrides: SetOption = None,
) -> None:
    """Say everything that is wrong with a recipe."""
    from peft_combo.recipe_files import check

    _print_faults(f"{name}: ", check(name, tuple(overrides or ())), fine=f"{name} is a valid recipe.")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from peft_combo.recipe_files import schema

    _print_json(schema())


@adapters_app.command("list")
def adapters_list(store: StoreOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the stored adapters."""
    from peft_combo.adapters import AdapterStore

    records = AdapterStore(store).list()
    if as_json:
        _print_json([record.manifest.model_dump(mode="json") for record in records])
        return
    rows = []
    for record in records:
        manifest = record.manifest
        before, after = (_metric(manifest.metrics, when, "ndcg@10") for when in ("before", "after"))
        size = sum(entry.bytes for entry in manifest.files.values())
        rows.append(
            (
                record.reference, manifest.method, manifest.backbone.model, manifest.data.name,
                f"{before} -> {after}", f"{size / 2**20:.1f} MiB", f"{manifest.created:%Y-%m-%d %H:%M}",
            )
        )  # fmt: skip
    if rows:
        _print_table(("adapter", "method", "backbone", "data", "NDCG@10", "size", "made (UTC)"), rows)
    else:
        print(f"No adapters in {store}. Make one with: peft-combo tune --recipe lora-fashion", file=sys.stderr)


@adapters_app.command("show")
def adapters_show(
    adapter: Annotated[str, typer.Argument(help="fashion (its latest version) or fashion@v2.")],
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's model card, or its manifest with --json."""
    from peft_combo.adapters import AdapterStore

    record = AdapterStore(store).open(adapter)
    if as_json:
        _print_json(record.manifest.model_dump(mode="json"))
    else:
        print(record.read("README.md").decode(), end="")


@adapters_app.command("verify")
def adapters_verify(
    adapter: Annotated[str | None, typer.Argument(help="fashion, fashion@v2, or nothing for the whole store.")] = None,
    store: StoreOption = Path("adapters"),
) -> None:
    """Check every file of the store against its manifest."""
    from peft_combo.adapters import AdapterStore

    opened = AdapterStore(store)
    if adapter is None and not store.is_dir():
        raise StoreError(f"No adapter store at {store}. Name it with --store, or make one with peft-combo tune.")
    checked = adapter or f"{(count := len(opened.list()))} adapter{'s' if count != 1 else ''}"
    _print_faults("", opened.verify(adapter), fine=f"{checked}: every file is as it was written.")


@adapters_app.command("remove")
def adapters_remove(
    adapter: Annotated[str, typer.Argument(help="fashion@v2; or fashion with --all.")],
    everything: Annotated[bool, typer.Option("--all", help="Remove every version of the category.")] = False,
    store: StoreOption = Path("adapters"),
) -> None:
    """Remove a version, or with --all a whole category."""
    from peft_combo.adapters import AdapterStore

    for reference in AdapterStore(store).remove(adapter, all=everything):
        print(f"removed {reference}")


@data_app.command("list")
def data_list(as_json: JsonOption = False) -> None:
    """List the data sources and what it takes to use each."""
    from peft_combo.data import available

    found = available()
    if as_json:
        _print_json([vars(source) for source in found])
    else:
        _print_table(("source", "what it is", "how to use it"), [(s.name, s.what, s.use) for s in found])


@data_app.command("check")
def data_check(recipe: RecipeOption = "lora-fashion", data: DataOption = None, overrides: SetOption = None) -> None:
    """Say everything that is wrong with a dataset: every fault with file, line and remedy."""
    from peft_combo.data import check_source
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    _print_faults("", check_source(loaded.data), fine="The data can be read; nothing is wrong with it.")


@data_app.command("stats")
def data_stats(
    recipe: RecipeOption = "lora-fashion",
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a dataset in figures, and how it would be split."""
    from peft_combo.data import describe, open_dataset, split_as
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    dataset = open_dataset(loaded.data)
    figures = describe(dataset, loaded.data.text)
    config = loaded.data
    try:
        parts = split_as(dataset, config)
        figures["split"] = {
            "by": config.split, "train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test),
            "dropped": len(parts.dropped), "digest": parts.digest,
        }  # fmt: skip
    except DataError as error:
        figures["split"] = str(error)
    if as_json:
        _print_json(figures)
    else:
        _print_table(("figure", "value"), [(name.replace("_", " "), _figure(value)) for name, value in figures.items()])


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A downloadable source; see: peft-combo data list")],
    folder: Annotated[Path, typer.Option("--to", help="Where downloads are kept.")] = Path("data"),
) -> None:
    """Download a public data set (checksum, cache) and print its folder."""
    from peft_combo.data import get

    print(get(name, folder))


# What stands below turns results into text.


class _ConsoleWatch(Watch):
    """Shows a run on stderr: notes, one plan line, a bar with loss and validation metric."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.main = _rank() == 0
        self._console = Console(stderr=True, quiet=not self.main, soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"), console=self._console, transient=True,
            disable=not (self.main and self._console.is_terminal),
        )  # fmt: skip
        self._task: Any = None
        self._told = {"loss": "", "valid": ""}

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def stage(self, name: str, total: int) -> None:
        if self._task is None:
            self._bar.start()
        else:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, told="")

    def advance(self, units: int) -> None:
        self._bar.advance(self._task, units)

    def planned(self, plan: Plan) -> None:
        self.note(f"Plan: {plan.line()}")

    def stepped(self, step: int, loss: float) -> None:
        self._told["loss"] = f"loss {loss:.3f}"
        self._bar.update(self._task, advance=1, told="  ".join(filter(None, self._told.values())))

    def evaluated(self, step: int, values: Mapping[str, float], best: bool) -> None:
        self._told["valid"] = f"valid NDCG@10 {values['ndcg@10']:.4f}"
        mark = " *" if best else ""
        self.note(
            f"step {step}: {self._told['loss']}, valid NDCG@10 {values['ndcg@10']:.4f}, R@10 {values['r@10']:.4f}{mark}"
        )

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def _console_watch() -> Iterator[_ConsoleWatch]:
    watch = _ConsoleWatch()
    try:
        yield watch
    finally:
        watch.close()


def _rank() -> int:
    import os

    return int(os.environ.get("RANK", "0"))


def _print_report(report: Report) -> None:
    counts = report.counts
    print(
        f"{report.dataset}: {counts['test questions']:,} questions from {counts['test bundles']:,} test bundles, "
        f"{counts['items']:,} items; split {report.split_digest[:12]}"
    )
    slices = [
        name for name in report.lines[0].slices if name in ("warm target", "cold target", "same-leaf", "cross-leaf")
    ]
    peers = sorted({name for line in report.lines for name in line.p})
    _print_table(
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


def _recommender(
    recipe: Recipe, adapter: str | None, store: Path, cache: Path, watch: _ConsoleWatch
) -> BundleRecommender:
    from peft_combo.adapters import AdapterStore
    from peft_combo.backbone import Backbone
    from peft_combo.bank import AdapterBank
    from peft_combo.data import open_dataset, split_as
    from peft_combo.recommender import BundleRecommender
    from peft_combo.vectors import VectorCache

    opened = AdapterStore(store)
    if adapter is not None:
        opened.open(adapter)  # a name that is not stored is better told before anything is loaded
    config = recipe.data
    dataset = open_dataset(config)
    parts = split_as(dataset, config)
    bank = AdapterBank(Backbone.of(recipe.backbone), opened)
    watch.stage("Encoding the catalogue", len(dataset.catalog) * (1 if adapter is None else 2))
    return BundleRecommender.fit(
        dataset, parts, bank, adapter, text=config.text, cache=VectorCache(cache), progress=watch.advance
    )


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _print_suggestions(suggestions: Sequence[Suggestion], explain: bool) -> None:
    rows = []
    for one in suggestions:
        why = ""
        if explain:
            shares = ", ".join(f"{name} {share:+.2f}" for name, share in one.shares.items())
            together = ", ".join(f"{count} bundles with {item}" for item, count in one.together.items())
            why = "; ".join(filter(None, (shares, together)))
        price = "" if one.price is None else f"{one.price:.2f}"
        rows.append((one.item_id, one.title, one.slot or "", price, f"{one.score:.2f}", why))
    header = ("item", "title", "slot", "price", "score", "why" if explain else "")
    _print_table(header if explain else header[:-1], rows if explain else [row[:-1] for row in rows])


def _print_bundles(bundles: Sequence[Recommendation], explain: bool) -> None:
    for place, bundle in enumerate(bundles, 1):
        price = "" if bundle.price is None else f", {bundle.price:.2f} in all"
        parts = ", ".join(f"{name} {value:+.2f}" for name, value in bundle.parts.items())
        print(f"{place}. score {bundle.score:.2f}{price}" + (f" ({parts})" if explain else ""))
        why = {entry["item"]: entry for entry in bundle.evidence}
        for item, title, slot in zip(bundle.items, bundle.titles, bundle.slots, strict=True):
            print(f"   {'+' if item in bundle.added else ' '} {slot:12} {item:12} {title}")
            if explain and item in why:
                print(f"     {' ' * 25}{_reasons(why[item])}")


def _reasons(entry: Mapping[str, Any]) -> str:
    reasons = [f"relevance {entry['relevance']:+.2f}, compatibility {entry['compatibility']:+.2f}"]
    if "together" in entry:
        reasons.append(f"in {entry['together']['bundles']} bundles with {entry['together']['with']}")
    if "agrees" in entry:
        reasons.append("same " + ", ".join(f"{name} {value}" for name, value in entry["agrees"].items()))
    if "rule" in entry:
        rule = entry["rule"]
        share = f"{rule['confidence']:.0%} of bundles with {rule['given']} have {rule['slot']}"
        reasons.append(f"{share} ({rule['support']} of {rule['of']})")
    return "; ".join(reasons)


def _print_tuned(result: TuneResult, recipe: Recipe) -> None:
    from peft_combo.tuning import duration

    plan = result.plan
    print(
        f"{recipe.category} by {recipe.adapter.method}: completing {plan.bundles['valid']} held-out validation bundles "
        f"({result.questions} questions of {result.groups} groups), each answer ranked among all {plan.items:,} items"
    )
    _print_table(
        ("", "R@1", "R@5", "R@10", "R@20", "NDCG@10", "95 % interval", "MRR"),
        [
            (
                row.name,
                *(f"{row.values[name]:.3f}" for name in ("r@1", "r@5", "r@10", "r@20", "ndcg@10")),
                f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
                f"{row.values['mrr']:.3f}",
            )
            for row in result.rows
        ],
        numbers=True,
    )
    gain = result.gain
    verdict = (
        "better than" if gain.interval[0] > 0 else "not clearly better than" if gain.value > 0 else "no better than"
    )
    print(
        f"The tuned encoder is {verdict} the frozen one: NDCG@10 {gain.value:+.4f} "
        f"[{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}], paired by group, p = {gain.p:.4f}."
    )
    print(
        "The step was chosen on these bundles, so the tuned row is slightly flattered; "
        f"{plan.bundles['test']} test bundles were not looked at."
    )
    steps = (
        f"{'stopped early, ' if result.stopped_early else ''}best step {result.chosen['best_step']} of {plan.steps}, "
    )
    steps += f"head at {result.chosen['strength']:.0%} of what it learned"
    spent = f"{duration(result.seconds)}, peak memory {result.peak_mib / 1024:.1f} GiB"
    print(f"Stored {result.record.reference} in {result.record.path}, read back and compared ({steps}; {spent}).")
    print(f"Loss log: {result.run_folder / 'log.jsonl'}")


def _tune_json(result: TuneResult) -> dict[str, Any]:
    return {
        "adapter": result.record.reference,
        "path": str(result.record.path),
        "plan": vars(result.plan),
        "rows": [{"name": row.name, **row.values, "ndcg@10 interval": row.interval} for row in result.rows],
        "gain": vars(result.gain),
        "questions": result.questions,
        "chosen": result.chosen,
        "stopped_early": result.stopped_early,
        "losses": result.losses,
        "seconds": result.seconds,
        "peak_mib": result.peak_mib,
    }


def _metric(metrics: Mapping[str, Any], when: str, name: str) -> str:
    values = metrics.get(when)
    value = values.get(name) if isinstance(values, Mapping) else None
    value = value.get("value") if isinstance(value, Mapping) else value
    return f"{value:.3f}" if isinstance(value, int | float) else "?"


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return "; ".join(map(_figure, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and place else "left", overflow="fold", no_wrap=numbers)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width; do not fold what a program will read
    console.print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return value._asdict()
    return str(value)


def _print_faults(prefix: str, faults: Sequence[Fault], fine: str) -> None:
    if not faults:
        print(fine)
        return
    raise PeftComboError.from_faults(f"{prefix}{len(faults)} fault{'s' if len(faults) > 1 else ''}:", faults)
