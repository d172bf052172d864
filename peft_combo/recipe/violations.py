"""Violations of a schema in sentences: where, what was expected, what was found, the nearest valid name.

pydantic says what it refused and where; what was expected is read off the JSON schema, so a range is stated once, in
the field, and a wrong type and a wrong range get the same full sentence. Knows no section and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from peft_combo.errors import Fault, did_you_mean
from peft_combo.recipe.fields import format_step, format_value


@dataclass(frozen=True, eq=False)
class SchemaReader:
    """What explains the errors of one model.

    Attributes:
        schema: its JSON schema. whole: what a complete value is called: "recipe".
    """

    schema: Mapping[str, Any]
    whole: str

    def explain(self, details: ErrorDetails) -> Fault:
        """Say in a sentence what one error of pydantic is: the dotted path, what was expected, what was found."""
        loc, found, context = details["loc"], details["input"], details.get("ctx", {})
        # pydantic's mark of a key it refuses, unless it is itself a user's key: then what was found is the value there.
        key_refused = details["type"] != "extra_forbidden" and loc[-2:] == (found, "[key]")
        path, node = self._locate(loc[:-1] if key_refused else loc, key=key_refused)
        where = ".".join(path)
        match details["type"]:
            case "fault":
                return Fault(context["where"] or where, context["problem"], context["remedy"])
            case "extra_forbidden":
                return self._explain_unknown_key(where, path[-1], self._locate(details["loc"][:-1])[1])
            case "union_tag_invalid" | "union_tag_not_found":
                tags = _list_tags(node)
                where = f"{where}.{context['discriminator'].strip(chr(39))}"
                found = found.get(where.rpartition(".")[2]) if isinstance(found, Mapping) else found
                if details["type"] == "union_tag_not_found":
                    return Fault(where, f"expected one of {', '.join(tags)}; found nothing.")
                return self._explain_mismatch(where, {"enum": list(tags)}, found)
            case "missing":
                return Fault(
                    where, f"expected {self._describe_expected(node)}, found nothing.", f"Every {self.whole} needs it."
                )
            case _:
                return self._explain_mismatch(where, node, found)

    def _explain_mismatch(self, where: str, node: Mapping[str, Any], found: object) -> Fault:
        expected = self._describe_expected(node)
        choices = _list_choices(node)
        problem = f"expected {expected}{';' if ',' in expected else ','} found {format_value(found)}."
        return Fault(where, problem, did_you_mean(found, choices) if isinstance(found, str) else "")

    def _explain_unknown_key(self, where: str, key: str, node: Mapping[str, Any]) -> Fault:
        known = list(node.get("properties", ()))
        homes = [path for path in self.list_key_paths() if path.rpartition(".")[2] == key]
        if where in homes:  # a key of another member of the union
            tags = (node.get("properties", {}).get(tag, {}).get("const") for tag in ("method", "kind"))
            member = next((tag for tag in tags if tag), "this")
            return Fault(where, f"unknown key for {member}.", f"Known here: {', '.join(known)}.")
        if homes:
            return Fault(where, "unknown key here.", f"It belongs elsewhere: {' or '.join(homes)}.")
        return Fault(where, "unknown key.", did_you_mean(key, known) or f"Known here: {', '.join(known)}.")

    def _locate(self, loc: Sequence[int | str], key: bool = False) -> tuple[list[str], Mapping[str, Any]]:
        """Follow pydantic's location; return the path a reader sees, and the schema there ({} where there is none).

        Args:
            key: whether the schema is wanted of the last step as a key, rather than of what stands under it.
        """
        path: list[str] = []
        parent: Mapping[str, Any] = {}
        node = self._resolve(self.schema)
        for step in loc:
            if step in _list_tags(node):  # the member of a union: pydantic names it, the recipe's path does not
                node = self._resolve({"$ref": _list_tags(node)[str(step)]})
            else:
                path.append(format_step(step))
                parent, node = node, self._find_child(node, step)
        return path, parent.get("propertyNames", {}) if key else node

    def _find_child(self, node: Mapping[str, Any], step: int | str) -> Mapping[str, Any]:
        if isinstance(step, int):
            return self._resolve(node.get("items", {}))
        free = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
        options = [node.get("properties", {}).get(step), *free]
        return self._resolve(next((option for option in options if isinstance(option, Mapping)), {}))

    def _resolve(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Look through a reference and through "or null"; keep whether null is allowed."""
        if "$ref" in node:
            return self._resolve(self.schema["$defs"][node["$ref"].rpartition("/")[2]])
        options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
        if len(options) == 1:
            return {**self._resolve(options[0]), "nullable": True}
        return node

    def _describe_expected(self, node: Mapping[str, Any]) -> str:
        text = self._describe_value(self._resolve(node))
        return f"{text}, or null" if self._resolve(node).get("nullable") else text

    def _describe_value(self, node: Mapping[str, Any]) -> str:
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
                return f"a list, each entry {self._describe_expected(node['items'])}"
            case _:
                return "a mapping of keys to values"

    def list_key_paths(self) -> tuple[str, ...]:
        """Return every dotted path that a value of the schema may hold, in order of the fields."""

        def below(node: Mapping[str, Any], path: str) -> list[str]:
            members = [self._resolve({"$ref": ref}) for ref in _list_tags(node).values()] or [self._resolve(node)]
            paths = [path] if path else []
            for member in members:
                for key, child in member.get("properties", {}).items():
                    paths += below(child, f"{path}.{key}" if path else key)
            return paths

        return tuple(dict.fromkeys(below(self.schema, "")))


def _list_tags(node: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the members of a discriminated union, tag to reference, in the order they were declared."""
    tags: Mapping[str, str] = node.get("discriminator", {}).get("mapping", {})
    declared = [option["$ref"] for option in node.get("oneOf", ())]
    return dict(sorted(tags.items(), key=lambda item: declared.index(item[1])))


def _list_choices(node: Mapping[str, Any]) -> list[str]:
    return [str(choice) for choice in node.get("enum", [node["const"]] if "const" in node else [])]


def _describe_range(node: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in node:
        low = f"above {node['exclusiveMinimum']:g}"
    else:
        low = f"from {node['minimum']}"
    if "exclusiveMaximum" in node:
        return f"{low} and below {node['exclusiveMaximum']:g}"
    return f"{low} to {node['maximum']}" if low.startswith("from") else f"{low} and at most {node['maximum']}"
