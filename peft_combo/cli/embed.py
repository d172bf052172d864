"""`embed`: vectors of a catalogue, or of a file of texts, made here, by processes or by a cluster."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo.cli.app import (
    CacheOption,
    DataOption,
    RecipeOption,
    RecipeStoreOption,
    SetOption,
    app,
    load_ready_recipe,
    open_workspace,
)
from peft_combo.cli.complete import complete_adapter
from peft_combo.cli.extras import require_extra
from peft_combo.cli.output import ConsoleWatch, console_watch, get_rank, print_line
from peft_combo.cli.workers import AddressOption, Machines, OnOption, WorkersOption, open_executor, refuse_alone
from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.distributed import Executor
    from peft_combo.encoder.bank import AdapterBank
    from peft_combo.recommender.workspace import Workspace


@app.command(short_help="Encode a catalogue once, by one process or many.")
def embed(
    recipe: RecipeOption,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            autocompletion=complete_adapter,
            help="Adapter, as in fashion or fashion@v2; default the frozen encoder.",
        ),
    ] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    cache: CacheOption = Path("vectors"),
    on: OnOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Parquet file of texts, in place of the recipe's catalogue.")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="With --texts: column of the texts; default text.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="With --texts: folder of the vectors, in shards with a manifest.")
    ] = None,
) -> None:
    """Encode a catalogue once; with --on by workers, under `accelerate launch` each process takes a share.

    With --texts a Parquet file of any size is encoded, block by block, into a folder of shards. What was encoded is
    kept as it comes: after a crash the same command goes on.
    """
    refuse_alone(
        ("--workers", workers is not None, "--on", on is not None),
        ("--address", address is not None, "--on ray", on == "ray"),
        ("--column", column is not None, "--texts", texts is not None),
        ("--to", to is not None, "--texts", texts is not None),
        ("--texts", texts is not None, "--to", to is not None),
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and (on is not None or texts is not None):
        raise PeftComboError(
            "Under accelerate launch each process takes a share of a catalogue; --on and --texts are for workers that "
            "this command starts itself. Start it without accelerate launch."
        )
    if texts is not None and not texts.is_file():
        raise PeftComboError(f"--texts: there is no file {texts}. Expected a Parquet file of texts.")
    if on == "ray":
        require_extra("ray", "--on ray")
    loaded = load_ready_recipe(recipe, overrides, data, store)
    with console_watch() as callback, ExitStack() as opened:
        from peft_combo.files import check_folder_target

        check_folder_target(cache if to is None else to)
        references = [] if adapter is None else [adapter]
        space = open_workspace(
            loaded, recipe, overrides, data, store, references, cache=cache, on_note=callback.on_note
        )
        bank = _open_bank(space, on)  # before the data: a base that is not whole is told at once

        def enlist() -> Executor | None:  # as late as it can be: what is wrong with the data is told before
            return _enlist(opened, on, workers, address, callback)

        if texts is not None and to is not None:
            told = _embed_file(bank, adapter, texts, column or "text", to, enlist, callback)
        else:
            told = _embed_catalogue(space, bank, adapter, cache, processes, enlist, callback)
    if callback.main:
        print_line(told)


def _open_bank(space: Workspace, on: Machines | None) -> AdapterBank:
    """Return the adapters over the encoder; where others encode, it is only to be named, and takes no GPU."""
    if on is None:
        return space.bank
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.encoder.bank import AdapterBank

    backbone = Backbone.of(space.recipe.backbone, "cpu")
    for note in backbone.notes:
        space.on_note(note)
    return AdapterBank(backbone, space.store)


def _enlist(
    opened: ExitStack, on: Machines | None, workers: int | None, address: str | None, callback: ConsoleWatch
) -> Executor | None:
    return None if on is None else opened.enter_context(open_executor(on, workers, address, callback))


def _embed_catalogue(
    space: Workspace, bank: AdapterBank, adapter: str | None, cache: Path, processes: int, enlist: Any,
    callback: ConsoleWatch,
) -> str:  # fmt: skip
    from peft_combo.encoder.vectors import VectorCache
    from peft_combo.encoder.vectors import embed as run

    dataset = space.dataset
    wanted = [dataset.texts] if adapter else dataset.read_frozen
    missing = sum(VectorCache(cache).missing(bank, texts, adapter) for texts in wanted)
    shared: dict[str, Any] = {"process": get_rank(), "processes": processes, "progress": callback.on_advance}
    if missing:
        shared["executor"] = enlist()
    callback.on_stage("Encoding the catalogue", missing // processes)
    count = sum(run(bank, texts, adapter, cache, **shared) for texts in wanted)
    whose = adapter or "the frozen encoder"
    return f"{len(dataset.catalog):,} items of {space.recipe.name} in {cache} for {whose}; {count:,} texts encoded now"


def _embed_file(
    bank: AdapterBank, adapter: str | None, file: Path, column: str, to: Path, enlist: Any, callback: ConsoleWatch
) -> str:
    from peft_combo.data.readers.text_column import TextColumn
    from peft_combo.encoder.shards import embed_shards

    texts = TextColumn(file, column)
    executor = enlist()
    callback.on_stage("Encoding", texts.rows)
    done = embed_shards(bank, texts, adapter, to, executor=executor, progress=callback.on_advance)
    manifest, kept = done.manifest, f", {done.kept:,} kept from before" if done.kept else ""
    return (
        f"{manifest.rows:,} texts of {file} in {to} for {manifest.adapter or 'the frozen encoder'}: "
        f"{len(manifest.shards):,} shards of {manifest.dim} columns; {done.encoded:,} texts encoded now{kept}"
    )
