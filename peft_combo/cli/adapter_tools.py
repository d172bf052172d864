"""`adapters diff`, `merge`, `convert`, `transfer`: what can be computed from stored adapters without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peft_combo.cli.app import (
    AdapterArgument,
    DataOption,
    JsonOption,
    RecipeOption,
    RecipeStoreOption,
    SetOption,
    adapters_app,
    load_ready_recipe,
    open_workspace,
)
from peft_combo.cli.complete import complete_adapter, complete_category, complete_recipe
from peft_combo.cli.export import load_named_recipe, load_own_recipe, open_store, read_lines
from peft_combo.cli.output import console_watch, print_json, print_line, print_table, split_words
from peft_combo.errors import PeftComboError
from peft_combo.files import check_folder_target

if TYPE_CHECKING:
    from peft_combo.adapters.convert import Conversion
    from peft_combo.adapters.diff import Change, Difference
    from peft_combo.adapters.merge import Merge
    from peft_combo.adapters.transfer import Transfer
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.metrics.report import Gain, ResultRow
    from peft_combo.recipe.model import Recipe
    from peft_combo.store.manifest import Manifest


OptionalRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", autocompletion=complete_recipe, help="Recipe of the backbone and the data to measure on."
    ),
]
TextsOption = Annotated[Path | None, typer.Option("--texts", help="File of texts to compare on, one a line.")]


@adapters_app.command("diff")
def adapters_diff(
    a: AdapterArgument,
    b: AdapterArgument,
    recipe: OptionalRecipe = None,
    texts: TextsOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters: what each changes in the weights and, with --recipe or --texts, in the answers."""
    loaded = load_named_recipe(recipe, overrides, data)
    opened = open_store(store, loaded)
    records = [opened.open(reference) for reference in (a, b)]
    with console_watch() as callback:
        from peft_combo.adapters.diff import diff
        from peft_combo.adapters.validation import ValidationQueries
        from peft_combo.encoder.bank import AdapterBank

        validation = None if loaded is None or texts is not None else ValidationQueries.of(loaded)
        compared = validation.texts if validation is not None else None if texts is None else read_lines(texts)
        backbone = _load_backbone([record.manifest for record in records], loaded)
        bank = AdapterBank(backbone, opened)
        found = diff(
            bank.get(records[0].reference), bank.get(records[1].reference), backbone,
            texts=compared, questions=None if validation is None else validation.questions, callback=callback,
        )  # fmt: skip
    if as_json:
        print_json(found.to_json())
    else:
        _print_difference(found)


@adapters_app.command("merge")
def adapters_merge(
    adapters: Annotated[
        list[str], typer.Argument(autocompletion=complete_adapter, help="Two adapters or more: fashion home@v2.")
    ],
    into: Annotated[str, typer.Option("--into", autocompletion=complete_category, help="Category to store it under.")],
    method: Annotated[
        Literal["average", "svd", "ties", "dare"],
        typer.Option(
            "--method",
            help="Merging method: average (the mean, whole), svd (the mean at --rank), ties or dare (less conflict).",
        ),
    ] = "average",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weights of the adapters, as in 2,1; default all alike.")
    ] = (None),
    density: Annotated[
        float | None,
        typer.Option("--density", help="Density, the share of values kept; default 0.2 for ties, 0.5 for dare."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Maximum rank of an update; default that of the widest adapter.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of what dare drops.")] = 0,
    recipe: OptionalRecipe = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one LoRA of several adapters; with --recipe it is measured beside them and the frozen encoder."""
    loaded = load_named_recipe(recipe, overrides, data)
    opened = open_store(store, loaded)
    records = [opened.open(reference) for reference in adapters]
    shares = _parse_weights(weights)
    from peft_combo.store.references import check_category

    check_category(into)
    check_folder_target(opened.path)
    with console_watch() as callback:
        from peft_combo.adapters.merge import merge
        from peft_combo.adapters.validation import ValidationQueries
        from peft_combo.encoder.bank import AdapterBank

        validation = None if loaded is None else ValidationQueries.of(loaded)
        backbone = _load_backbone([record.manifest for record in records], loaded)
        bank = AdapterBank(backbone, opened)
        done = merge(
            [bank.get(record.reference) for record in records], backbone, opened, into,
            method=method, weights=shares, density=density, rank=rank, seed=seed, validation=validation,
            callback=callback,
        )  # fmt: skip
    if as_json:
        print_json(done.to_json())
    else:
        _print_merge(done)


@adapters_app.command("convert")
def adapters_convert(
    adapter: AdapterArgument,
    rank: Annotated[int | None, typer.Option("--rank", help="Maximum rank of an update; default any.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="Maximum share of an update's norm left out; default 1e-5, exact."),
    ] = None,
    texts: TextsOption = None,
    recipe: OptionalRecipe = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store an adapter of another method as plain LoRA, its next version, where that is the same thing."""
    loaded = load_named_recipe(recipe, overrides, data)
    opened = open_store(store, loaded)
    record = opened.open(adapter)
    check_folder_target(opened.path)
    with console_watch() as callback:
        from peft_combo.adapters.convert import MAX_ERROR, convert
        from peft_combo.data.sources import open_dataset
        from peft_combo.encoder.bank import AdapterBank

        if texts is not None:
            compared = read_lines(texts)
        else:
            source = (loaded or load_own_recipe(record.manifest)).ready().data
            compared = list(open_dataset(source).texts)
        backbone = _load_backbone([record.manifest], loaded)
        done = convert(
            AdapterBank(backbone, opened).get(record.reference), backbone, opened,
            texts=compared, rank=rank, max_error=MAX_ERROR if max_error is None else max_error, callback=callback,
        )  # fmt: skip
    if as_json:
        print_json(done.to_json())
    else:
        _print_conversion(done)


@adapters_app.command("transfer")
def adapters_transfer(
    recipe: RecipeOption,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(autocompletion=complete_adapter, help="Adapters to try; default the newest of every category."),
    ] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the best stored adapter to start a new category from, on the recipe's validation questions."""
    loaded = load_ready_recipe(recipe, overrides, data, store)
    with console_watch() as callback:
        # What is not stored is told before torch is loaded.
        space = open_workspace(loaded, recipe, overrides, data, store, adapters or ())

        from peft_combo.adapters.transfer import transfer
        from peft_combo.adapters.validation import ValidationQueries

        found = transfer(ValidationQueries.of(loaded), space.backbone, space.store, adapters or None, callback)
    if as_json:
        print_json(found.to_json())
    else:
        _print_transfer(found, recipe)


# --- what is asked ----------------------------------------------------------------------------------------------------


def _load_backbone(manifests: Sequence[Manifest], recipe: Recipe | None) -> Backbone:
    """Load the encoder the adapters were tuned on, in full precision: arithmetic on weights needs all their bits."""
    from peft_combo.encoder.backbone import Backbone

    stamp = manifests[0].backbone
    own = recipe or next((load_own_recipe(manifest) for manifest in manifests if manifest.recipe), None)
    model = stamp.model if own is None else own.backbone.model
    pooling: Literal["mean", "cls"] = "cls" if stamp.pooling == "cls" else "mean"
    return Backbone.load(model, pooling=pooling, max_length=stamp.max_length, text_prefix=stamp.text_prefix)


def _parse_weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in split_words(text) or ()]
    except ValueError as error:
        raise PeftComboError(f'--weights: expected numbers with commas between them, as in 2,1; found "{text}".') from (
            error
        )


# --- what is told -----------------------------------------------------------------------------------------------------


def _print_difference(found: Difference) -> None:
    for title, changes in (("by layer", found.layers), ("by weight", found.modules), ("head", found.head)):
        if changes:
            print_table(
                (title, found.a, found.b, "cosine", "subspace", "of"), list(map(_format_change, changes)), numbers=True
            )
            print_line()
    if found.layers:
        print_line(
            "Changes are Frobenius norms relative to the frozen weight, in the head to the identity. Subspace: how far "
            "the inputs that the strongest directions of both read are the same, from 0 to 1."
        )
    print_line(f"The heads multiply cosines by {found.scales[0]:.1f} and {found.scales[1]:.1f}.")
    answers = found.predictions
    if answers is not None:
        print_line(
            f"{answers.texts:,} texts: mean cosine between the two vectors {answers.cosine:.4f}; of the ten nearest "
            f"neighbours {answers.neighbours:.1%} are the same ({answers.queries:,} texts asked)."
        )
        if answers.questions is not None and answers.ndcg is not None:
            print_line(
                f"Of {answers.questions:,} validation questions the first answer changes in {answers.first_churn:.1%}, "
                f"the set of ten in {answers.list_churn:.1%}; NDCG@10 {answers.ndcg[0]:.4f} and {answers.ndcg[1]:.4f}."
            )
    else:
        print_line("Answers were not compared: name a recipe with --recipe, or texts with --texts.")
    for note in found.notes:
        print_line(f"Note: {note}")


def _format_change(change: Change) -> tuple[str, ...]:
    overlap = () if change.overlap is None else (f"{change.overlap:.2f}", str(change.directions))
    cosine = "" if change.cosine is None else f"{change.cosine:+.3f}"
    return (change.name, f"{change.a:.4f}", f"{change.b:.4f}", cosine, *(overlap or ("", "")))


def _print_merge(done: Merge) -> None:
    if done.rows:
        _print_rows(done.rows)
    if done.gain is not None:
        print_line(f"Over the frozen encoder: {_format_gain(done.gain)}. The test bundles were not looked at.")
    told = ", ".join(f"{name} ({weight:.2f})" for name, weight in done.parents)
    ranks = sorted(done.ranks.values())
    wide = (
        f"ranks {ranks[0]} to {ranks[-1]}, {done.truncation:.1e} of the change's norm left out" if ranks else "a head"
    )
    measured = "" if done.rows else "; not measured"
    print_line(f"Stored {done.record.reference} in {done.record.path}: {told} by {done.method}; {wide}{measured}.")
    for note in done.notes:
        print_line(f"Note: {note}")


def _print_conversion(done: Conversion) -> None:
    ranks = sorted(done.ranks.values())
    print_line(
        f"Stored {done.record.reference} in {done.record.path}: {done.source} as plain LoRA, {len(ranks)} updates of "
        f"ranks {ranks[0]} to {ranks[-1]}, at most {done.error:.1e} of an update's norm left out."
    )
    print_line(
        f"Largest difference in a component of a vector: {done.difference:.1e} over {done.texts:,} texts; "
        f"{done.bytes_before / 2**20:.2f} MiB before, {done.bytes_after / 2**20:.2f} MiB now."
    )
    if done.bytes_after > done.bytes_merged:
        print_line(
            f"Note: the weights it changes have {done.bytes_merged / 2**20:.2f} MiB, so merged it would be smaller: "
            f"peft-combo adapters export {done.record.reference} --to FOLDER"
        )


def _print_transfer(found: Transfer, recipe: str) -> None:
    rows = [
        ("frozen backbone", "identity", *_format_metrics(found.frozen), "", "", f"{found.frozen_alignment:.3f}", "")
    ]
    rows += [
        (
            start.adapter, start.head, *_format_metrics(start.row), f"{start.gain.value:+.4f}", f"{start.gain.p:.4f}",
            f"{start.alignment:.3f}", start.caveat,
        )
        for start in found.starts
    ]  # fmt: skip
    header = ("", "head", "R@10", "NDCG@10", "95 % interval", "over frozen", "p", "alignment", "caveat")
    print_table(header, rows, numbers=True)
    print_line(found.protocol)
    for note in found.notes:
        print_line(f"Note: {note}")
    if found.advised is None:
        print_line("No adapter that can be relied on here is surely better than the frozen one: start without --from.")
    else:
        print_line(f"Start from it with: peft-combo tune --recipe {recipe} --from {found.advised}")


def _print_rows(rows: Sequence[ResultRow]) -> None:
    print_table(
        ("", "R@10", "NDCG@10", "95 % interval"), [(row.name, *_format_metrics(row)) for row in rows], numbers=True
    )  # fmt: skip


def _format_metrics(row: ResultRow) -> tuple[str, str, str]:
    low, high = row.interval
    return f"{row.values['r@10']:.3f}", f"{row.values['ndcg@10']:.3f}", f"{low:.3f} to {high:.3f}"


def _format_gain(gain: Gain) -> str:
    low, high = gain.interval
    return f"NDCG@10 {gain.value:+.4f} [{low:+.4f}, {high:+.4f}], paired by group, p = {gain.p:.4f}"
