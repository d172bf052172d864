"""`serve`: the service over HTTP, and the keys that open it; `data forget`, which removes a person."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from peft_combo.cli.app import (
    DataOption,
    JsonOption,
    RecipeStoreOption,
    SetOption,
    app,
    data_app,
    load_ready_recipe,
    open_workspace,
)
from peft_combo.cli.complete import complete_alias, complete_recipe
from peft_combo.cli.extras import require_extra
from peft_combo.cli.output import print_error, print_json, print_line, print_table, split_words
from peft_combo.errors import PeftComboError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from peft_combo.serving.config import ServiceConfig
    from peft_combo.serving.state import Scope, State

_FOLLOW = ("watch", "told", "fixed")
_ENCODERS = ("torch", "onnx", "int8", "pruned")

serve_app = typer.Typer(help="The service over HTTP, and the keys that open it.")
keys_app = typer.Typer(help="API keys: add, list, remove.", no_args_is_help=True)
serve_app.add_typer(keys_app, name="keys")
app.add_typer(serve_app, name="serve")

ServedRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        autocompletion=complete_recipe,
        envvar="PEFT_COMBO_RECIPE",
        help="Name of a shipped recipe, or a YAML file.",
    ),
]
ServedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        autocompletion=complete_alias,
        help="Alias to serve, as in fashion@prod; may be repeated; default the recipe's category.",
    ),
]
StateOption = Annotated[
    str,
    typer.Option("--state", envvar="PEFT_COMBO_STATE", help="Folder of the service's state, or its database URL."),
]


@serve_app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    recipe: ServedRecipeOption = None,
    adapters: ServedOption = None,
    host: Annotated[str, typer.Option("--host", envvar="PEFT_COMBO_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", envvar="PEFT_COMBO_PORT", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8765,
    workers: Annotated[
        int, typer.Option("--workers", envvar="PEFT_COMBO_WORKERS", min=1, max=64, help="Processes that answer.")
    ] = 1,
    state: StateOption = "state",
    follow: Annotated[
        str, typer.Option("--adapters", help="Who moves an alias: watch (the store), told (a promotion), fixed.")
    ] = "told",
    encoder: Annotated[
        str, typer.Option("--encoder", help="Form of the encoder: torch, onnx, int8 or pruned.")
    ] = "torch",
    explore: Annotated[
        str | None,
        typer.Option(
            "--explore",
            help="Draw of lists, to learn from: epsilon-greedy:SHARE, plackett-luce:TEMPERATURE or thompson:VIEWS; "
            "default the ranking as it is.",
        ),
    ] = None,
    opened: Annotated[
        str | None,
        typer.Option(
            "--open", help="Scopes that need no key, as in read,write or none; default read,write on loopback."
        ),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Further name that clients on loopback call by; may be repeated."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Key of the certificate, PEM.")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on stderr for every request.")] = False,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the vector cache.")] = Path("vectors"),
    fitted: Annotated[Path, typer.Option("--fitted", help="Folder of fitted recommenders.")] = Path("fitted"),
) -> None:
    """Serve stored adapters and a fitted recommender over HTTP, with a page to look at."""
    if context.invoked_subcommand is not None:
        return
    if recipe is None:
        raise PeftComboError("Name a recipe: peft-combo serve --recipe lora-fashion")
    require_extra("serve", "The service")
    _check_choice("--adapters", follow, _FOLLOW)
    _check_choice("--encoder", encoder, _ENCODERS)
    loaded = load_ready_recipe(recipe, overrides, data, store)
    open_workspace(loaded, recipe, overrides, data, store, adapters or ())  # what is not there is told before torch

    from peft_combo.serving.config import make_config

    config = make_config(
        {
            "recipe": recipe, "overrides": overrides or (), "data": data, "store": store, "adapters": adapters or (),
            "follow": follow, "encoder": encoder, "explore": explore,
            "vectors": cache, "fitted": fitted, "host": host, "port": port,
            "workers": workers, "state": state, "open": None if opened is None else _read_scopes(opened, "--open"),
            "hosts": hosts or (), "tls_cert": tls_cert, "tls_key": tls_key, "access_log": access_log,
        }
    )  # fmt: skip
    for path in (tls_cert, tls_key):
        if path is not None and not path.is_file():
            raise PeftComboError(f"{path} is no file. --tls-cert and --tls-key name PEM files.")
    _run(config)


def _run(config: ServiceConfig) -> None:
    """Serve until a signal; a supervisor of several workers answers nothing itself, so it loads no encoder."""
    from peft_combo.serving.processes import serve as run

    if config.workers > 1:
        run(config, print_error, _print_ready)
        return
    from peft_combo.serving.service import Service

    run(config, print_error, _print_ready, Service.open)


def _print_ready(lines: Sequence[str]) -> None:
    import sys

    for line in lines:
        print_line(line)
    sys.stdout.flush()


def _check_choice(option: str, given: str, choices: Iterable[str]) -> None:
    if given not in choices:
        hint = did_you_mean(given, choices)
        raise PeftComboError(f'{option}: expected {", ".join(choices)}, found "{given}". {hint}'.rstrip())


def _read_scopes(given: str, option: str) -> frozenset[Scope]:
    from peft_combo.serving.state.rows import SCOPES

    words = [] if given == "none" else split_words(given) or []
    for word in words:
        _check_choice(option, word, SCOPES)
    return cast("frozenset[Scope]", frozenset(words))


def _open_state(place: str) -> State:
    require_extra("serve", "The service")
    from peft_combo.serving.state import State

    return State.open(place)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Name of the key, by which the audit log knows its holder.")],
    scope: Annotated[
        str, typer.Option("--scope", help="What it may do: read, write, admin, or several, as in read,write.")
    ] = "read",
    per_minute: Annotated[
        int | None, typer.Option("--per-minute", min=1, help="Requests a minute; default the service's limit.")
    ] = None,
    state: StateOption = "state",
) -> None:
    """Make a key and print it, this once: only a hash of it is stored."""
    require_extra("serve", "The service")
    scopes = _read_scopes(scope, "--scope")
    if not scopes:
        raise PeftComboError("--scope: expected read, write or admin, found none of them.")
    opened = _open_state(state)
    try:
        print_line(opened.add_key(name, scopes, per_minute))
    finally:
        opened.close()


@keys_app.command("list")
def keys_list(state: StateOption = "state", as_json: JsonOption = False) -> None:
    """List the keys: names, ids and scopes; the keys themselves nobody has but their holders."""
    opened = _open_state(state)
    try:
        found = opened.list_keys()
    finally:
        opened.close()
    rows: list[dict[str, Any]] = [
        {"name": one.name, "id": one.key_id, "scopes": sorted(one.scopes), "per_minute": one.per_minute}
        for one in found
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("name", "id", "scopes", "a minute"),
            [(r["name"], r["id"], ", ".join(r["scopes"]), r["per_minute"] or "") for r in rows],
        )


@keys_app.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="Name of the key.")], state: StateOption = "state") -> None:
    """Remove a key: a running service refuses it within seconds."""
    opened = _open_state(state)
    try:
        opened.remove_key(name)
    finally:
        opened.close()
    print_line(f"removed {name}")


@data_app.command("forget")
def data_forget(
    user: Annotated[str, typer.Argument(help="Id of the user, as events and requests had it.")],
    state: StateOption = "state",
    as_json: JsonOption = False,
) -> None:
    """Remove a person from the service's state; running services drop them from scorers and caches."""
    opened = _open_state(state)
    try:
        counts = opened.forget(opened.identify(user), "command line")
    finally:
        opened.close()
    if as_json:
        print_json(counts)
    else:
        print_line("removed " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
