"""Field types of recipes: strict numbers, texts of one line, and how a refusal is raised.

Knows no section, no default and no file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints
from pydantic_core import PydanticCustomError

from peft_combo.errors import make_printable

# True is not an integer and "8" is not one either; a whole number is a fine real number (strict floats take 1 as 1.0).
Int = Annotated[int, Strict()]
Real = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
# Control characters would travel into paths, manifests and terminals.
Text = Annotated[
    str,
    Strict(),
    StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$"),
    Field(json_schema_extra={"patternErrorMessage": "one line of text"}),
]


class Section(BaseModel):
    """Part of a recipe: frozen, without unknown keys, without infinities."""

    # Defaults are validated too, so that a check across two fields also sees the one that was not given.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def fault(problem: str, remedy: str = "", where: str = "") -> PydanticCustomError:
    """Return what a validator raises: expected and found in `problem`, and the dotted path if it is not the field's."""
    return PydanticCustomError("fault", "{problem}", {"problem": problem, "remedy": remedy, "where": where})


def format_value(value: object) -> str:
    """Return a value the way a recipe would write it, short enough for one line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            text = make_printable(json.dumps(value, ensure_ascii=False))
        case int():
            # Python refuses to print integers of thousands of digits.
            text = str(value) if value.bit_length() < 256 else "an integer of very many digits"
        case float():
            text = repr(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "an empty list" if not value else "a list"
        case _:
            return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]}..."


def format_step(step: int | str) -> str:
    """Return one step of a dotted path; a key that would blur the path is quoted and cut."""
    return str(step) if isinstance(step, int) or re.fullmatch(r"[\w-]{1,64}", step) else format_value(step)
