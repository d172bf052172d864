"""`adapters`: what the store holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peft_combo.cli.app import JsonOption, StoreOption, adapters_app
from peft_combo.cli.shown import metric, print_faults, print_json, print_table
from peft_combo.errors import StoreError


@adapters_app.command("list")
def adapters_list(store: StoreOption = Path("adapters"), as_json: JsonOption = False) -> None:
    """List the stored adapters."""
    from peft_combo.adapters import AdapterStore

    records = AdapterStore(store).list()
    if as_json:
        print_json([record.manifest.model_dump(mode="json") for record in records])
        return
    rows = []
    for record in records:
        manifest = record.manifest
        before, after = (metric(manifest.metrics, when, "ndcg@10") for when in ("before", "after"))
        size = sum(entry.bytes for entry in manifest.files.values())
        rows.append(
            (
                record.reference, manifest.method, manifest.backbone.model, manifest.data.name,
                f"{before} -> {after}", f"{size / 2**20:.1f} MiB", f"{manifest.created:%Y-%m-%d %H:%M}",
            )
        )  # fmt: skip
    if rows:
        print_table(("adapter", "method", "backbone", "data", "NDCG@10", "size", "made (UTC)"), rows)
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
        print_json(record.manifest.model_dump(mode="json"))
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
    print_faults("", opened.verify(adapter), fine=f"{checked}: every file is as it was written.")


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
