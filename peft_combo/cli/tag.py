"""`tag` and `classify`: what the head of a tuned adapter says of new texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import JsonOption, StoreOption, app
from peft_combo.cli.complete import complete_adapter
from peft_combo.cli.output import format_figure, print_json, print_line, print_marked, print_table
from peft_combo.errors import DataError

if TYPE_CHECKING:
    from peft_combo.data.labels.tags import Entity, Tagger
    from peft_combo.encoder.bank import AdapterBank, LiveAdapter


TextsArgument = Annotated[list[str], typer.Argument(help="One text or more, each in quotes.", show_default=False)]
_COLOURS = ("bold cyan", "bold magenta", "bold green", "bold yellow", "bold blue", "bold red")


@app.command(short_help="Find the entities of texts; give items their slots.")
def tag(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts, each in quotes.", show_default=False)] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            autocompletion=complete_adapter,
            help="Tagging adapter, as in fashion-tags@v2; default a list of fashion nouns.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of a catalogue whose titles are tagged, in place of texts.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--to", help="With --data: items.csv to write, with slot and entity of every item.")
    ] = None,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Find the entities of texts and mark them; or give the items of a catalogue their slots by their titles."""
    from peft_combo.data.labels.tags import noun_entities
    from peft_combo.files import check_file_target

    if bool(texts) == (data is not None) or (data is None) != (target is None):
        raise DataError("Expected texts to tag, or --data FOLDER with --to items.csv for a whole catalogue.")
    if target is not None:
        if target.suffix != ".csv":
            ending = target.suffix or "no ending"
            raise DataError(f"Items are written as .csv, found {ending!r}. Try {target.with_suffix('.csv')}")
        check_file_target(target)
    tagger = noun_entities if adapter is None else load_tagger(adapter, store)
    if data is not None and target is not None:
        _tag_catalogue(data, target, tagger, as_json)
        return
    given = texts or []
    found = tagger(given)
    if as_json:
        print_json([{"text": text, "entities": list(map(asdict, own))} for text, own in zip(given, found, strict=True)])
        return
    for text, entities in zip(given, found, strict=True):
        _print_marked(text, entities)
        if entities:
            print_table(
                ("type", "text", "characters", "score"),
                [(one.type, one.text, f"{one.start} to {one.end}", f"{one.score:.3f}") for one in entities],
            )


def load_tagger(reference: str, store: Path) -> Tagger:
    """Load a tagging adapter over the encoder that its own recipe names."""
    bank, live = _load_adapter(reference, store, "tagging")

    from peft_combo.encoder.heads.tagging import AdapterTagger, TaggingHead

    return AdapterTagger(bank.backbone, live.attached, live.head_as(TaggingHead))


def _tag_catalogue(folder: Path, target: Path, tagger: Tagger, as_json: bool) -> None:
    from collections import Counter

    from peft_combo.data.labels.tags import with_slots
    from peft_combo.data.readers.folder import write_items
    from peft_combo.data.sources import open_dataset
    from peft_combo.recipe.model import DataConfig

    catalog = open_dataset(DataConfig(source="folder", path=str(folder)), "items").catalog
    tagged = with_slots(catalog, tagger)
    write_items(tagged, target)
    given = Counter(
        new for old, new in zip(catalog.slots, tagged.slots, strict=True) if old is None and new is not None
    )
    told = {
        "items": len(tagged),
        "slots_before": sum(slot is not None for slot in catalog.slots),
        "slots_given": dict(given.most_common()),
        "without_slot": tagged.slots.count(None),
    }
    if as_json:
        print_json({"file": str(target), **told})
        return
    print_line(
        f"{given.total():,} of {len(tagged):,} items got a slot ({format_figure(told['slots_given']) or 'none'}); "
        f"{told['slots_before']:,} had one, {told['without_slot']:,} have none."
    )
    print_line(f"Written to {target}. With the other tables beside it, as items.csv, it is a folder for --data.")


@app.command(short_help="Tell the class of texts.")
def classify(
    texts: TextsArgument,
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", autocompletion=complete_adapter, help="Classification adapter, as in intents or intents@v2."
        ),
    ],
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Tell the class of texts with a classification adapter, and how likely it is."""
    bank, live = _load_adapter(adapter, store, "classification")

    from peft_combo.encoder.heads.classification import ClassificationHead

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


@app.command(short_help="Find the answer templates that fit questions.")
def match(
    texts: TextsArgument,
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", autocompletion=complete_adapter, help="Matching adapter, as in answers or answers@v2."
        ),
    ],
    templates: Annotated[
        Path | None, typer.Option("--templates", help="File of answer templates, one a line; default those it learned.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Number of templates for each text.")] = 3,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Find the answer templates that fit questions best, by the cosine of their vectors."""
    import numpy as np

    from peft_combo.cli.export import read_lines
    from peft_combo.data.labels.answers import read_answers
    from peft_combo.encoder.heads.matching import MatchingHead
    from peft_combo.recommender.workspace import Workspace

    space = Workspace.of_adapter(adapter, store=store, task="matching")
    live = space.bank.get(adapter)
    live.head_as(MatchingHead)
    known = read_answers(space.recipe.data).answers if templates is None else tuple(read_lines(templates))
    vectors = space.bank.backbone.encode([*texts, *known], live.attached)
    scores = vectors[: len(texts)] @ vectors[len(texts) :].T  # (Q, D) @ (D, A) -> (Q, A)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    told = [
        {"text": text, "templates": [{"template": known[a], "score": float(own[a])} for a in places.tolist()]}
        for text, own, places in zip(texts, scores, best, strict=True)
    ]
    if as_json:
        print_json(told)
        return
    rows = [
        (text if not place else "", known[a], f"{own[a]:.3f}")
        for text, own, places in zip(texts, scores, best, strict=True)
        for place, a in enumerate(places.tolist())
    ]
    print_table(("text", "template", "cosine"), rows)


def _load_adapter(reference: str, store: Path, task: str) -> tuple[AdapterBank, LiveAdapter]:
    """Load an adapter over the encoder that its own recipe names."""
    from peft_combo.recommender.workspace import Workspace

    bank = Workspace.of_adapter(reference, store=store, task=task).bank
    return bank, bank.get(reference)


def _print_marked(text: str, entities: Sequence[Entity]) -> None:
    """Print a text with its entities in colour, and in brackets with their type, which survive a pipe."""
    colour = {
        name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(sorted({one.type for one in entities}))
    }
    parts: list[tuple[str, str | None]] = []
    place = 0
    for one in entities:
        parts += [(text[place : one.start], None), (f"[{one.text}]({one.type})", colour[one.type])]
        place = one.end
    print_marked([*parts, (text[place:], None)])
