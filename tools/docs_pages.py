"""Pages of the documentation that are written when it is built: commands, fields of a recipe, routes of the service.

A hook of mkdocs (`hooks` in mkdocs.yml). They come out of the code that runs, so none can fall behind it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to what mkdocs found."""
    pages = {
        "reference/cli.md": describe_commands(),
        "reference/fields.md": describe_fields(),
        "reference/http.md": describe_routes(),
    }
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def describe_commands() -> str:
    """Return every command with its arguments and options, as typer documents them."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "cli.md"
        subprocess.run(
            [sys.executable, "-m", "typer", "peft_combo.cli", "utils", "docs", "--name", "peft-combo", "--title",
             "Command line", "--output", str(page)],
            check=True, capture_output=True, cwd=REPOSITORY,
        )  # fmt: skip
        return page.read_text(encoding="utf-8")


def describe_fields() -> str:
    """Return every key of a recipe with its values, default and meaning, section by section."""
    sys.path.insert(0, str(REPOSITORY))
    from peft_combo.recipe.parse import recipe_schema

    schema = recipe_schema()
    lines = [
        "# Fields of a recipe", "",
        "A recipe is a YAML file; `extends` starts from another one, `--set section.key=value` overrides a key. "
        "`peft-combo recipes schema` gives this page as JSON Schema, for an editor.", "",
        *_describe_table("", schema["properties"], schema["$defs"]),
    ]  # fmt: skip
    for name, field in schema["properties"].items():
        choices = field.get("discriminator", {}).get("mapping")
        if choices:
            lines += [f"## {name}", "", field.get("description", ""), ""]
            kind = field["discriminator"]["propertyName"]
            for value, place in choices.items():
                section = schema["$defs"][place.rsplit("/", 1)[1]]
                lines += [f"### {kind}: {value}", "", section.get("description", ""), ""]
                lines += _describe_table(f"{name}.", _without(section["properties"], kind), schema["$defs"])
        elif "$ref" in field:
            section = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]
            lines += [f"## {name}", "", field.get("description", section.get("description", "")), ""]
            lines += _describe_table(f"{name}.", section["properties"], schema["$defs"])
    return "\n".join(lines) + "\n"


def describe_routes() -> str:
    """Return every route of the service with its body, as its OpenAPI document has them."""
    sys.path.insert(0, str(REPOSITORY))
    if find_spec("fastapi") is None:
        return "# HTTP\n\nWritten from the service: `pip install 'peft-combo[serve]'` before the pages are built.\n"
    from fastapi import FastAPI

    from peft_combo.serving.app import ROUTERS

    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    document = app.openapi()
    lines = [
        "# HTTP", "",
        "Written from the service's OpenAPI document; `GET /openapi.json` gives it with examples of your own "
        "catalogue. [Serving](../serving.md) tells what the routes are for.", "",
    ]  # fmt: skip
    schemas, shown = document["components"]["schemas"], set()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            about = " ".join((route.get("description") or route.get("summary", "")).split())
            lines += [f"## {method.upper()} {path}", "", about, ""]
            for one in route.get("parameters", ()):
                told = one.get("description") or one["schema"].get("description", "")
                lines += [f"- `{one['name']}` ({one['in']}): {told}".rstrip(": "), ""]
            for media in route.get("requestBody", {}).get("content", {}).values():
                name = media.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
                if name in shown:
                    lines += [f"Body: `{name}`, as above.", ""]
                elif name:
                    shown.add(name)
                    lines += [f"Body: `{name}`", "", *_describe_body(schemas[name], schemas)]
    return "\n".join(lines) + "\n"


def _describe_body(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return the fields of a body; OpenAPI leaves out a default of null, so what is not required has it."""
    required = schema.get("required", ())
    fields = {
        name: field if name in required else {"default": None, **field} for name, field in schema["properties"].items()
    }
    return _describe_table("", fields, schemas)


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: field for key, field in fields.items() if key != name}


def _describe_table(prefix: str, fields: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    """Return rows of keys; those of a section within a section follow its own."""
    if not fields:
        return ["No keys of its own.", ""]
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        rows += _describe_rows(f"{prefix}{name}", field, sections)
    return [*rows, ""]


def _describe_rows(key: str, field: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    default = "required" if "default" not in field else f"`{_tell(field['default'])}`"
    meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
    if "discriminator" in field or ("$ref" in field and "." not in key):  # it has a part of its own
        return [f"| `{key}` | section | | {meaning} |"]
    rows = [f"| `{key}` | {_name_values(field)} | {default} | {meaning} |"]
    for place in [field.get("$ref"), *(one.get("$ref") for one in field.get("anyOf", ()))]:
        if place is not None:
            inner = sections[place.rsplit("/", 1)[1]]
            for name, own in inner["properties"].items():
                rows += _describe_rows(f"{key}.{name}", own, sections)
    return rows


def _name_values(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{_tell(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(_name_values(one) for one in field["anyOf"])
    if "$ref" in field:
        return "section"
    kind = {"integer": "whole number", "array": "list", "object": "section"}.get(
        field.get("type", ""), field.get("type")
    )
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    low, high = (None if bound is None else f"{bound:g}" for bound in (low, high))
    above = "above " if "exclusiveMinimum" in field else "from "
    below = "below " if "exclusiveMaximum" in field else "to "
    bounds = [f"{above}{low}" if low is not None else "", f"{below}{high}" if high is not None else ""]
    return " ".join(filter(None, (kind or "any", *bounds)))


def _tell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_tell(own)}" for key, own in value.items()) if 0 < len(value) < 3 else "none"
    return {"None": "null", "True": "true", "False": "false", "": "empty", "[]": "none"}.get(str(value), str(value))
