"""`doctor` command: diagnostics of this machine as a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peft_combo.cli.app import JsonOption, StoreOption, app
from peft_combo.cli.output import console_watch, print_json, print_line, print_table

_ROW = 200  # characters of a row of the table; what is longer stands below it, whole and fit to be copied


@app.command(short_help="Look at versions, GPUs, an encoder, disk and the store.")
def doctor(
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            help="Encoder to look at: embedded (the default), embedded-multilingual, a folder or a hub id.",
        ),
    ] = "embedded",
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Look at versions, back-ends, GPUs, an encoder's files, disk and the store; sends nothing anywhere."""
    from peft_combo.cli.diagnostics import examine

    with console_watch() as callback:
        findings = examine(store, lambda what: callback.on_note(f"looking at {what}"), backbone)
    if as_json:
        print_json([asdict(one) for one in findings])
    else:
        long = [one for one in findings if len(one.found) + len(one.remedy) > _ROW]
        print_table(
            ("", "what", "found", "what to do"),
            [
                (
                    {"ok": "ok", "note": "--", "problem": "!!"}[one.status], one.what,
                    *(("see below", "") if one in long else (one.found, one.remedy)),
                )
                for one in findings
            ],
        )  # fmt: skip
        for one in long:
            print_line(f"{one.what}: {one.found} {one.remedy}".rstrip())
    if any(one.status == "problem" for one in findings):
        raise typer.Exit(1)
