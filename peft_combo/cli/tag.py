"""`tag` and `classify`: what the head of a tuned adapter says of new texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import JsonOption, StoreOption, app
from peft_combo.cli.shown import print_json, print_table

if TYPE_CHECKING:
    from peft_combo.bank import AdapterBank, LiveAdapter
    from peft_combo.tasks.tagging import Entity

TextsArgument = Annotated[list[str], typer.Argument(help="One text or more, each in quotes.", show_default=False)]
_COLOURS = ("bold cyan", "bold magenta", "bold green", "bold yellow", "bold blue", "bold red")


@app.command()
def tag(
    texts: TextsArgument,
    adapter: Annotated[str, typer.Option("--adapter", help="A tagging adapter: fashion-tags or fashion-tags@v2.")],
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Find the entities of texts with a tagging adapter, and mark them."""
    from peft_combo.tasks.tagging import TaggingHead, tag_texts

    bank, live = _loaded(adapter, store)
    found = tag_texts(bank.backbone, live.attached, live.head_as(TaggingHead), texts)
    if as_json:
        print_json([{"text": text, "entities": list(map(asdict, own))} for text, own in zip(texts, found, strict=True)])
        return
    for text, entities in zip(texts, found, strict=True):
        _print_marked(text, entities)
        if entities:
            print_table(
                ("type", "text", "characters", "score"),
                [(one.type, one.text, f"{one.start} to {one.end}", f"{one.score:.3f}") for one in entities],
            )


@app.command()
def classify(
    texts: TextsArgument,
    adapter: Annotated[str, typer.Option("--adapter", help="A classification adapter: intents or intents@v2.")],
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Tell the class of texts with a classification adapter, and how likely it is."""
    from peft_combo.tasks.classification import ClassificationHead

    bank, live = _loaded(adapter, store)
    head = live.head_as(ClassificationHead)
    likely = head.probabilities(bank.backbone.encode(texts, live.attached))
    given = head.classes(likely)
    told = [
        {
            "text": text,
            "classes": [name for name, own in zip(head.labels, said, strict=True) if own],
            "probabilities": dict(zip(head.labels, map(float, row), strict=True)),
        }
        for text, said, row in zip(texts, given, likely, strict=True)
    ]
    if as_json:
        print_json(told)
        return
    rows = []
    for one, row in zip(told, likely, strict=True):
        best = sorted(zip(head.labels, map(float, row), strict=True), key=lambda pair: -pair[1])[:3]
        rows.append(
            (one["text"], "; ".join(one["classes"]) or "none", ", ".join(f"{name} {share:.2f}" for name, share in best))
        )
    print_table(("text", "class", "most likely"), rows)


def _loaded(reference: str, store: Path) -> tuple[AdapterBank, LiveAdapter]:
    """Load an adapter over the encoder that its own recipe names."""
    from peft_combo.adapters import AdapterStore
    from peft_combo.backbone import Backbone
    from peft_combo.bank import AdapterBank
    from peft_combo.recipe import parse_recipe

    adapters = AdapterStore(store)
    recipe = parse_recipe(adapters.open(reference).manifest.recipe, f"The recipe of {reference} cannot be read:")
    bank = AdapterBank(Backbone.of(recipe.backbone), adapters)
    return bank, bank.get(reference)


def _print_marked(text: str, entities: list[Entity]) -> None:
    """Print a text with its entities in colour, and in brackets with their type, which survive a pipe."""
    from rich.console import Console
    from rich.text import Text

    colour = {
        name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(sorted({one.type for one in entities}))
    }
    marked, place = Text(), 0
    for one in entities:
        marked.append(text[place : one.start])
        marked.append(f"[{one.text}]({one.type})", style=colour[one.type])
        place = one.end
    marked.append(text[place:])
    Console(highlight=False, soft_wrap=True).print(marked)
