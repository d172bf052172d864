"""`rate`: how likely a customer is to take items, by the head of a tuned rating adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peft_combo.cli.app import CacheOption, DataOption, JsonOption, StoreOption, app, check_data_path
from peft_combo.cli.complete import complete_adapter
from peft_combo.cli.output import console_watch, print_json, print_table


@app.command(short_help="Tell how likely a customer is to take items.")
def rate(
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", autocompletion=complete_adapter, help="Rating adapter, as in home-rating or home-rating@v2."
        ),
    ],
    items: Annotated[
        list[str] | None,
        typer.Argument(help="Ids or titles of items to rate; default the likeliest of all.", show_default=False),
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="Id of the user whose history counts.")] = None,
    liked: Annotated[
        list[str] | None,
        typer.Option("--liked", help="Id or title of an item they liked, the latest first; may be repeated."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Number of items, where none are given.")] = 10,
    data: DataOption = None,
    store: StoreOption = Path("adapters"),
    cache: CacheOption = Path("vectors"),
    as_json: JsonOption = False,
) -> None:
    """Tell how likely a customer is to take items, by what they took before, with a rating adapter."""
    with console_watch() as callback:
        from peft_combo.recommender.workspace import Workspace

        space = Workspace.of_adapter(
            adapter, data=data, store=store, cache=cache, needs="interactions", task="rating", on_note=callback.on_note
        )
        check_data_path(space.recipe)

        from peft_combo.encoder.heads.rating import RatingHead
        from peft_combo.recommender.rating import Rater
        from peft_combo.recommender.rating import rate as run

        head = space.bank.get(adapter).head_as(RatingHead)
        dataset = space.dataset
        callback.on_stage("Encoding the catalogue", len(space.dataset.texts))
        vectors = space.encode_catalog(adapter, callback.on_advance)
        rater = Rater.of(vectors, head, dataset.interactions)
    found = run(rater, dataset, liked=liked or (), user=user, items=items or (), k=k)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    print_table(("item", "title", "probability"), [(one.item_id, one.title, f"{one.probability:.3f}") for one in found])
