"""`adapters export`: a stored adapter as something that runs without us."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peft_combo.cli.app import AdapterArgument, DataOption, JsonOption, RecipeStoreOption, SetOption, adapters_app
from peft_combo.cli.complete import complete_recipe
from peft_combo.cli.extras import require_extra
from peft_combo.cli.output import console_watch, print_json, print_line, print_table
from peft_combo.errors import DataError, RecipeError

if TYPE_CHECKING:
    from peft_combo.adapters.export import Export
    from peft_combo.recipe.model import Recipe
    from peft_combo.store.adapter_store import AdapterStore
    from peft_combo.store.manifest import Manifest


OwnRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", autocompletion=complete_recipe, help="Recipe of backbone and data; default the adapter's own."
    ),
]


@adapters_app.command("export")
def adapters_export(
    adapter: AdapterArgument,
    to: Annotated[Path, typer.Option("--to", help="Folder to write, new or empty.")],
    format: Annotated[
        Literal["merged", "onnx", "onnx-int8"],
        typer.Option("--format", help="Format: merged for transformers; onnx, onnx-int8 for one graph, with [onnx]."),
    ] = "merged",
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement", min=0, max=1,
            help="Minimum share of the ten nearest neighbours kept, else no export; default 0.99, for onnx-int8 0.95.",
        ),
    ] = None,
    max_ndcg_loss: Annotated[
        float | None,
        typer.Option(
            "--max-ndcg-loss", min=0, max=1, help="Maximum loss of NDCG@10 on validation, else no export; default 0.01."
        ),
    ] = None,
    prune_vocabulary: Annotated[
        bool,
        typer.Option("--prune-vocabulary", help="Vocabulary cut to the tokens of the texts; vectors of these stay."),
    ] = False,
    prune_heads: Annotated[
        int, typer.Option("--prune-heads", min=0, help="Number of attention heads to take out, least important first.")
    ] = 0,
    prune_layers: Annotated[
        int, typer.Option("--prune-layers", min=0, help="Number of layers to take out, least important first.")
    ] = 0,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="File of texts to measure on; default the recipe's catalogue.")
    ] = None,
    recipe: OwnRecipeOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Write an adapter as a merged encoder or an ONNX graph, and measure what of it was kept."""
    if format != "merged":
        require_extra("onnx", f"--format {format}")
    named = load_named_recipe(recipe, overrides, data)
    opened = open_store(store, named)
    record = opened.open(adapter)
    manifest = record.manifest
    loaded = named or load_own_recipe(manifest)
    with console_watch() as callback:
        from peft_combo.adapters.export import check_export
        from peft_combo.adapters.export import export as run
        from peft_combo.adapters.pruning import Pruning
        from peft_combo.data.queries import Queries
        from peft_combo.recommender.workspace import Workspace

        check_export(to, format)
        # In full precision whatever the adapter was tuned on: an export starts from there.
        stamp = manifest.backbone
        encoder = loaded.backbone.model_copy(
            update={"quantization": "none", "pooling": stamp.pooling, "text_prefix": stamp.text_prefix}
        )
        space = Workspace.of(loaded.model_copy(update={"backbone": encoder}), store=opened.path)
        questions = None
        if texts is not None:
            measured = read_lines(texts)
        else:
            loaded.ready()
            measured = list(space.dataset.texts)
            questions = Queries.of(space.dataset.bundles, space.split.valid)
        done = run(
            space.bank.get(record.reference), space.backbone, to, format,
            texts=measured, questions=questions, min_agreement=min_agreement, max_ndcg_loss=max_ndcg_loss,
            pruning=Pruning(prune_vocabulary, prune_heads, prune_layers), callback=callback,
        )  # fmt: skip
    if as_json:
        print_json({"path": str(done.folder), **done.to_json()})
    else:
        _print_export(done)


def load_named_recipe(name: str | None, overrides: list[str] | None, data: Path | None) -> Recipe | None:
    """Load the recipe that a command was given; None where it was given none, nor what belongs to one."""
    from peft_combo.recipe.files import load_recipe

    if name is not None:
        return load_recipe(name, tuple(overrides or ()), data)
    if data is not None or overrides:
        raise RecipeError("--data and --set go with --recipe. Add --recipe NAME, or drop them.")
    return None


def open_store(store: Path | None, recipe: Recipe | None) -> AdapterStore:
    """Open the store of --store, else of the recipe, else the usual one."""
    from peft_combo.store.adapter_store import AdapterStore

    return AdapterStore(store or (recipe.store if recipe is not None else "adapters"))


def load_own_recipe(manifest: Manifest) -> Recipe:
    """Read the recipe that an adapter was tuned with."""
    from peft_combo.recipe.parse import parse_recipe

    if not manifest.recipe:
        raise RecipeError(
            f"Adapter {manifest.reference} has no recipe of its own (imported or merged). Name one with --recipe whose "
            "backbone it was tuned on."
        )
    return parse_recipe(manifest.recipe, title=f"The recipe of {manifest.reference} does not hold together:")


def read_lines(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--texts: expected a UTF-8 text file, one text a line; {path} cannot be read: {error}.") from (
            error
        )
    return [line.strip() for line in content.splitlines() if line.strip()]


def _print_export(done: Export) -> None:
    header = (
        "",
        "distance max",
        "mean",
        "top 10 kept",
        "for queries",
        "NDCG@10",
        "alone/batch",
        "MiB",
        "ms at 1",
        "ms at 32",
    )
    print_table(
        header,
        [
            (
                row.name, f"{row.distance_max:.1e}", f"{row.distance_mean:.1e}", f"{row.agreement:.4f}",
                f"{row.crossed:.4f}",
                "" if row.ndcg is None else f"{row.ndcg:.4f}", f"{row.batch_difference:.1e}",
                f"{row.nbytes / 2**20:.1f}", *(f"{spent:.1f}" for spent in row.p50_ms.values()),
            )
            for row in done.rows
        ],
        numbers=True,
    )  # fmt: skip
    asked = "" if done.questions is None else f", {done.questions:,} validation questions"
    print_line(
        f"Against torch with the adapter attached: 1 - cosine of {done.texts:,} texts, neighbours of {done.queries:,}"
        f"{asked}; median of a pass, {done.threads} thread{'s' if done.threads > 1 else ''}."
    )
    for note in done.notes:
        print_line(f"Note: {note}")
    kept = "".join(f" ({told})" for told in (done.scheme, done.pruned and f"pruned: {done.pruned}") if told)
    print_line(f"Wrote {done.reference} as {done.format}{kept} to {done.folder}")
