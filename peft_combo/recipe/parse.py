"""Parsing and validation of recipes: every fault at once, with its place and the nearest valid name; JSON schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peft_combo.errors import Fault, RecipeError, did_you_mean
from peft_combo.recipe.fields import format_value
from peft_combo.recipe.model import Recipe


def parse_recipe(raw: Mapping[str, object], title: str = "The recipe does not hold together:") -> Recipe:
    """Make a recipe of plain values, as read from YAML, JSON or an adapter's manifest.

    Args:
        raw: the recipe's keys, inheritance and overrides already applied.
        title: first line of the error.
    Raises:
        RecipeError: with every fault, dotted path first, in the order of the fields.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [_explain_error(details) for details in error.errors(include_url=False)]
    raise RecipeError.from_faults(title, dict.fromkeys(faults))


# How a violation reads. pydantic says what it refused and where; what was expected is read off the JSON schema, so a
# range is stated once, in the field, and a wrong type and a wrong range get the same full sentence.


def _explain_error(details: ErrorDetails) -> Fault:
    loc, found, context = details["loc"], details["input"], details.get("ctx", {})
    # pydantic's mark of a key it refuses, unless it is itself a user's key: then what was found is the value there.
    key_refused = details["type"] != "extra_forbidden" and loc[-2:] == (found, "[key]")
    path, node = _locate(loc[:-1] if key_refused else loc, key=key_refused)
    where = ".".join(path)
    match details["type"]:
        case "fault":
            return Fault(context["where"] or where, context["problem"], context["remedy"])
        case "extra_forbidden":
            return _explain_unknown_key(where, path[-1], _locate(details["loc"][:-1])[1])
        case "union_tag_invalid" | "union_tag_not_found":
            tags = _list_tags(node)
            where = f"{where}.{context['discriminator'].strip(chr(39))}"
            found = found.get(where.rpartition(".")[2]) if isinstance(found, Mapping) else found
            if details["type"] == "union_tag_not_found":
                return Fault(where, f"expected one of {', '.join(tags)}; found nothing.")
            return _explain_mismatch(where, {"enum": list(tags)}, found)
        case "missing":
            return Fault(where, f"expected {_describe_expected(node)}, found nothing.", "Every recipe needs it.")
        case _:
            return _explain_mismatch(where, node, found)


def _explain_mismatch(where: str, node: Mapping[str, Any], found: object) -> Fault:
    expected = _describe_expected(node)
    choices = _list_choices(node)
    problem = f"expected {expected}{';' if ',' in expected else ','} found {format_value(found)}."
    return Fault(where, problem, did_you_mean(found, choices) if isinstance(found, str) else "")


def _explain_unknown_key(where: str, key: str, node: Mapping[str, Any]) -> Fault:
    known = list(node.get("properties", ()))
    homes = [path for path in list_key_paths() if path.rpartition(".")[2] == key]
    if where in homes:  # a key of another member of the union
        tags = (node.get("properties", {}).get(tag, {}).get("const") for tag in ("method", "kind"))
        member = next((tag for tag in tags if tag), "this")
        return Fault(where, f"unknown key for {member}.", f"Known here: {', '.join(known)}.")
    if homes:
        return Fault(where, "unknown key here.", f"It belongs elsewhere: {' or '.join(homes)}.")
    return Fault(where, "unknown key.", did_you_mean(key, known) or f"Known here: {', '.join(known)}.")


def _locate(loc: Sequence[int | str], key: bool = False) -> tuple[list[str], Mapping[str, Any]]:
    """Follow pydantic's location; return the path a reader sees, and the schema there ({} where there is none).

    Args:
        key: whether the schema is wanted of the last step as a key, rather than of what stands under it.
    """
    path: list[str] = []
    parent: Mapping[str, Any] = {}
    node = _resolve(recipe_schema())
    for step in loc:
        if step in _list_tags(node):  # the member of a union: pydantic names it, the recipe's path does not
            node = _resolve({"$ref": _list_tags(node)[str(step)]})
        else:
            path.append(format_step(step))
            parent, node = node, _find_child(node, step)
    return path, parent.get("propertyNames", {}) if key else node


def _find_child(node: Mapping[str, Any], step: int | str) -> Mapping[str, Any]:
    if isinstance(step, int):
        return _resolve(node.get("items", {}))
    free = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    options = [node.get("properties", {}).get(step), *free]
    return _resolve(next((option for option in options if isinstance(option, Mapping)), {}))


@lru_cache(maxsize=1)
def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a complete recipe. Shared: copy before changing."""
    return Recipe.model_json_schema()


@lru_cache(maxsize=1)
def list_key_paths() -> tuple[str, ...]:
    """Return every dotted path a recipe may hold, in order of the fields."""

    def below(node: Mapping[str, Any], path: str) -> list[str]:
        members = [_resolve({"$ref": ref}) for ref in _list_tags(node).values()] or [_resolve(node)]
        paths = [path] if path else []
        for member in members:
            for key, child in member.get("properties", {}).items():
                paths += below(child, f"{path}.{key}" if path else key)
        return paths

    return tuple(dict.fromkeys(below(recipe_schema(), "")))


def _resolve(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Look through a reference and through "or null"; keep whether null is allowed."""
    if "$ref" in node:
        return _resolve(recipe_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if len(options) == 1:
        return {**_resolve(options[0]), "nullable": True}
    return node


def _list_tags(node: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the members of a discriminated union, tag to reference, in the order they were declared."""
    tags: Mapping[str, str] = node.get("discriminator", {}).get("mapping", {})
    declared = [option["$ref"] for option in node.get("oneOf", ())]
    return dict(sorted(tags.items(), key=lambda item: declared.index(item[1])))


def _list_choices(node: Mapping[str, Any]) -> list[str]:
    return [str(choice) for choice in node.get("enum", [node["const"]] if "const" in node else [])]


def _describe_expected(node: Mapping[str, Any]) -> str:
    text = _describe_value(_resolve(node))
    return f"{text}, or null" if _resolve(node).get("nullable") else text


def _describe_value(node: Mapping[str, Any]) -> str:
    if choices := _list_choices(node):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if "patternErrorMessage" in node:
        return str(node["patternErrorMessage"])
    match node.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return f"an integer {_describe_range(node)}"
        case "number":
            return f"a number {_describe_range(node)}"
        case "array":
            return f"a list, each entry {_describe_expected(node['items'])}"
        case _:
            return "a mapping of keys to values"


def _describe_range(node: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in node:
        low = f"above {node['exclusiveMinimum']:g}"
    else:
        low = f"from {node['minimum']}"
    if "exclusiveMaximum" in node:
        return f"{low} and below {node['exclusiveMaximum']:g}"
    return f"{low} to {node['maximum']}" if low.startswith("from") else f"{low} and at most {node['maximum']}"


def format_step(step: int | str) -> str:
    """Return one step of a dotted path; a key that would blur the path is quoted and cut."""
    return str(step) if isinstance(step, int) or re.fullmatch(r"[\w-]{1,64}", step) else format_value(step)
