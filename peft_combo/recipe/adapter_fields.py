"""Fields that several adapter methods have: which layers are adapted, rank, scale, dropout, length."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from peft_combo.errors import did_you_mean
from peft_combo.recipe.fields import Int, Real, Text, fault, format_value

TargetSet = Literal["attention", "attention+ffn", "query+value"]


def _target_list(value: object) -> object:
    # A union of a choice and a list would be reported once per member; this says it once.
    names = get_args(TargetSet)
    expected = f"expected one of {', '.join(names)}, or a list of module names"
    if isinstance(value, str) and value not in names:
        raise fault(f"{expected}; found {format_value(value)}.", did_you_mean(value, names))
    if not isinstance(value, str | list | tuple) or not value:
        raise fault(f"{expected}; found {format_value(value)}.")
    for entry in value:
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            raise fault(f"{expected}; found {format_value(entry)} in the list.")
    return value


Targets = Annotated[
    TargetSet | tuple[Text, ...],
    BeforeValidator(_target_list),
    Field(
        description="Linear layers that get an adapter: query+value, attention (query, key, value, output), "
        "attention+ffn, or a list of module names."
    ),
]
TopLayerCount = Annotated[
    Int | None,
    Field(
        ge=1,
        le=256,
        description="Adapt only this many layers nearest the output, counted from the top; null adapts all. The layers "
        "below then give the same states at every step and can be computed once.",
    ),
]
Rank = Annotated[Int, Field(ge=1, le=1024, description="Rank of each update.")]
Alpha = Annotated[
    Real, Field(gt=0, le=4096, description="Scale; the update is multiplied by alpha / rank, so keep their ratio.")
]
Dropout = Annotated[
    Real,
    Field(ge=0, lt=1, description="Dropout on the input of each update; on a CPU it costs a third of the step."),
]
Length = Annotated[
    Int, Field(ge=1, le=512, description="Virtual positions; they count against the model's limit of positions.")
]
