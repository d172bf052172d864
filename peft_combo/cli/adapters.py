"""`adapters` commands: list, show, verify, aliases, rollback, garbage collection, import, removal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peft_combo.cli.app import AdapterArgument, JsonOption, StoreOption, adapters_app
from peft_combo.cli.complete import complete_adapter, complete_alias, complete_alias_name, complete_category
from peft_combo.cli.output import (
    console_watch,
    format_metric,
    print_error,
    print_faults,
    print_json,
    print_line,
    print_table,
    print_text,
)
from peft_combo.errors import StoreError


@adapters_app.command("list")
def adapters_list(store: StoreOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the stored adapters."""
    from peft_combo.store.adapter_store import AdapterStore

    opened = AdapterStore(store)
    records = opened.list()
    if as_json:
        print_json([record.manifest.model_dump(mode="json") for record in records])
        return
    names: dict[str, list[str]] = {}
    try:
        for alias in opened.aliases():
            names.setdefault(alias.target, []).append(alias.name)
    except StoreError as error:  # what is stored can be listed all the same
        print_error(error)
    rows = []
    for record in records:
        manifest = record.manifest
        before, after = (format_metric(manifest.metrics, when, "ndcg@10") for when in ("before", "after"))
        size = sum(entry.bytes for entry in manifest.files.values())
        rows.append(
            (
                record.reference, ", ".join(names.get(record.reference, ())), manifest.method, manifest.backbone.model,
                manifest.data.name, f"{before} -> {after}" if manifest.metrics else "not measured", _format_mib(size),
                f"{manifest.created:%Y-%m-%d %H:%M}",
            )
        )  # fmt: skip
    if rows:
        print_table(("adapter", "aliases", "method", "backbone", "data", "NDCG@10", "size", "made (UTC)"), rows)
    else:
        print_error(f"No adapters in {store}. Make one with: peft-combo tune --recipe lora-fashion")


@adapters_app.command("show")
def adapters_show(
    adapter: AdapterArgument,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's model card, or its manifest with --json."""
    from peft_combo.store.adapter_store import AdapterStore

    record = AdapterStore(store).open(adapter)
    if as_json:
        print_json(record.manifest.model_dump(mode="json"))
    else:
        print_text(record.read("README.md").decode())


@adapters_app.command("verify")
def adapters_verify(
    adapter: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_adapter,
            help="Adapter: fashion, fashion@v2 or fashion@prod; default the whole store.",
        ),
    ] = None,
    store: StoreOption = Path("adapters"),
) -> None:
    """Check every file of the store against its manifest."""
    from peft_combo.store.adapter_store import AdapterStore

    opened = AdapterStore(store)
    if adapter is None and not store.is_dir():
        raise StoreError(
            f"No adapter store at {store}. Name it with --store, or make one with: peft-combo tune --recipe NAME"
        )
    checked = adapter or f"{(count := len(opened.list()))} adapter{'s' if count != 1 else ''}"
    print_faults("", opened.verify(adapter), fine=f"{checked}: every file is as it was written.")


@adapters_app.command("import")
def adapters_import(
    folder: Annotated[Path, typer.Argument(help="Folder of PEFT, of a stored version, or of a merged export.")],
    category: Annotated[
        str, typer.Option("--category", autocompletion=complete_category, help="Category to store it under.")
    ],
    backbone: Annotated[
        str, typer.Option("--backbone", help="Encoder: embedded, embedded-multilingual, a hub id or a folder.")
    ] = "embedded",
    pooling: Annotated[
        Literal["mean", "cls"] | None,
        typer.Option("--pooling", help="Pooling of token vectors into one vector per text; default the encoder's own."),
    ] = None,
    text_prefix: Annotated[
        str | None, typer.Option("--text-prefix", help="What every text begins with; default the encoder's own.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=4, help="Maximum length of a text in tokens.")] = 64,
    store: StoreOption = Path("adapters"),
) -> None:
    """Check an adapter from elsewhere and store it. PEFT opens what is stored: there is no export."""
    from peft_combo.files import check_folder_target
    from peft_combo.store.adapter_store import AdapterStore
    from peft_combo.store.references import check_category

    check_category(category)
    opened = AdapterStore(check_folder_target(store))

    from peft_combo.adapters.import_peft import check_import, import_adapter
    from peft_combo.encoder.backbone import Backbone

    check_import(folder)
    encoder = Backbone.load(backbone, pooling=pooling, max_length=max_length, text_prefix=text_prefix)
    with console_watch() as callback:
        for note in encoder.notes:
            callback.on_note(note)
        record = import_adapter(folder, category, encoder, opened, callback)
    known = "head, recipe, data and metrics came with it" if record.manifest.imported is None else "not measured"
    print_line(f"Stored {record.reference} in {record.path}; {known}.")
    print_line(f"Measure it with: peft-combo evaluate --recipe NAME --adapter {record.reference}")


@adapters_app.command("alias")
def adapters_alias(
    adapter: Annotated[
        str,
        typer.Argument(
            autocompletion=complete_adapter,
            help="Adapter: fashion@v3, fashion for its latest, fashion@staging for its version.",
        ),
    ],
    name: Annotated[str, typer.Argument(autocompletion=complete_alias_name, help="Name of the alias, as in prod.")],
    store: StoreOption = Path("adapters"),
) -> None:
    """Let an alias point to a version; fashion@prod then stands for it everywhere."""
    from peft_combo.store.adapter_store import AdapterStore

    alias = AdapterStore(store).alias(adapter, name)
    print_line(f"{alias.reference} -> v{alias.version}")


@adapters_app.command("aliases")
def adapters_aliases(
    of: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_category, help="Category, or fashion@prod for its whole history; default all."
        ),
    ] = None,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """List where aliases point, and where one pointed before."""
    from peft_combo.store.adapter_store import AdapterStore
    from peft_combo.store.references import parse_reference

    wanted = None if of is None else parse_reference(of)
    if wanted is not None and wanted.version is not None:
        raise StoreError(f'"{of}" is a version. Name a category ({wanted.category}) or an alias.')
    opened = AdapterStore(store)
    if of is not None and wanted is not None and wanted.alias is not None:
        alias = opened.alias_at(of)
        if as_json:
            print_json(alias.model_dump(mode="json"))
            return
        print_table(
            (alias.reference, "since (UTC)", ""),
            [(f"v{m.version}", f"{m.at:%Y-%m-%d %H:%M:%S}", "rolled back" if m.rollback else "") for m in alias.moves],
        )
        return
    found = opened.aliases(None if wanted is None else wanted.category)
    if as_json:
        print_json([alias.model_dump(mode="json") for alias in found])
    elif found:
        print_table(
            ("alias", "points to", "since (UTC)", "before that"),
            [
                (
                    alias.reference, f"v{alias.version}", f"{alias.moves[-1].at:%Y-%m-%d %H:%M:%S}",
                    "" if alias.before is None else f"v{alias.before}",
                )
                for alias in found
            ],
        )  # fmt: skip
    else:
        print_error(f"No aliases in {store}. Set one with: peft-combo adapters alias fashion prod")


@adapters_app.command("rollback")
def adapters_rollback(
    alias: Annotated[str, typer.Argument(autocompletion=complete_alias, help="Alias, as in fashion@prod.")],
    store: StoreOption = Path("adapters"),
) -> None:
    """Let an alias point to what it pointed to before."""
    from peft_combo.store.adapter_store import AdapterStore

    moved = AdapterStore(store).rollback(alias)
    print_line(f"{moved.reference} -> v{moved.version}, back from v{moved.moves[-2].version}")


@adapters_app.command("unalias")
def adapters_unalias(
    alias: Annotated[str, typer.Argument(autocompletion=complete_alias, help="Alias, as in fashion@prod.")],
    store: StoreOption = Path("adapters"),
) -> None:
    """Remove an alias; the version it points to stays."""
    from peft_combo.store.adapter_store import AdapterStore

    gone = AdapterStore(store).unalias(alias)
    print_line(f"removed {gone.reference}, which pointed to v{gone.version}")


@adapters_app.command("remove")
def adapters_remove(
    adapter: Annotated[
        str,
        typer.Argument(
            autocompletion=complete_adapter,
            help="Adapter: fashion@v2, or fashion with --all; not while an alias points to it.",
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every version of the category.")] = False,
    store: StoreOption = Path("adapters"),
) -> None:
    """Remove a version, or with --all a whole category."""
    from peft_combo.store.adapter_store import AdapterStore

    for reference in AdapterStore(store).remove(adapter, all=everything):
        print_line(f"removed {reference}")


@adapters_app.command("gc")
def adapters_gc(
    keep: Annotated[
        int | None, typer.Option("--keep", help="Number of newest versions kept of each category; default 3.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="Minimum age of what is removed, in days; default any.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List of what would go, and no change.")] = False,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Remove old versions and what dead writers left; never what an alias points to or would roll back to."""
    from datetime import timedelta

    from peft_combo.store.adapter_store import KEPT_VERSIONS, AdapterStore

    if older_than is not None and not 0 <= older_than <= 100_000:
        raise StoreError(f"--older-than: expected a number of days from 0 to 100000, found {older_than}.")
    age = None if older_than is None else timedelta(days=older_than)
    gone = AdapterStore(store).collect(KEPT_VERSIONS if keep is None else keep, age, dry_run=dry_run)
    if as_json:
        print_json([garbage._asdict() for garbage in gone])
        return
    for garbage in gone:
        print_line(f"{'would remove' if dry_run else 'removed'} {garbage.name} ({_format_mib(garbage.bytes)})")
    total = _format_mib(sum(garbage.bytes for garbage in gone))
    print_line(f"{total} {'would be freed' if dry_run else 'freed'}" if gone else "Nothing to remove.")


def _format_mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
