"""Recipe files: found by name or path, read as YAML, completed by what they extend, listed and copied.

Knows where recipes lie, how their YAML is read and how one builds on another. What a recipe may hold is `recipe`'s.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_combo.errors import Fault, RecipeError, did_you_mean, make_printable
from peft_combo.files import atomic_file, check_file_target, list_shipped_recipes, recipes_folder, write_text
from peft_combo.recipe.fields import format_value
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe, recipe_schema
from peft_combo.recipe.yaml import MAX_DEPTH, YamlFault, read_scalar, read_yaml

# A recipe is a page of text. The limits keep a wrong or hostile file from costing more than its error message.
_MAX_BYTES = 64 * 1024
_MAX_PARENTS = 8


class RecipeSummary(NamedTuple):
    """One line of `recipes list`."""

    name: str
    category: str
    method: str
    summary: str


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = (), data: str | Path | None = None) -> Recipe:
    """Read a recipe, complete it by what it extends, apply the overrides and check the result.

    Args:
        name_or_path: the name of a shipped recipe ("lora-fashion"), or the path of a file (holds a "/" or ends in
            ".yaml").
        overrides: "training.epochs=2", as `--set` takes them; later ones win.
        data: folder of the data, as `--data` takes it. A recipe whose source has no folder becomes one of source
            "folder", without what belonged to the other source.
    Raises:
        RecipeError: with every fault, dotted path first.
    """
    file = _find(name_or_path)
    raw = _read_with_parents(file)
    chosen = _read_overrides(overrides)
    told = _merge(raw, chosen).get("data")
    if data is not None and isinstance(told, dict):
        # Laid below the overrides, so that what belongs to another source goes, and what was set for this one stays.
        place = {"source": "bundlerec" if told.get("source") == "bundlerec" else "folder", "path": str(data)}
        raw = _merge(_merge(raw, {"data": place}), chosen)
        raw["data"] = {**raw["data"], **place}
    else:
        raw = _merge(raw, chosen)
    return parse_recipe(raw, title=f"Recipe {_format_path(file)} does not hold together:")


def check(name_or_path: str | Path, overrides: Iterable[str] = (), data: str | Path | None = None) -> list[Fault]:
    """Return every fault of a recipe; none means that it loads."""
    try:
        load_recipe(name_or_path, overrides, data)
    except RecipeError as error:
        return list(error.faults) or [Fault(str(name_or_path), " ".join(str(error).splitlines()))]
    return []


def list_recipes() -> list[RecipeSummary]:
    """Return the shipped recipes in order of their names."""
    summaries = []
    for name in list_shipped_recipes():
        recipe = load_recipe(name)
        first_line = read_recipe_text(name).partition("\n")[0]
        summaries.append(RecipeSummary(name, recipe.category, recipe.adapter.method, first_line.lstrip("# ").strip()))
    return summaries


def read_recipe_text(name_or_path: str | Path) -> str:
    """Return a recipe as it is written, comments and all."""
    return _read_text(_find(name_or_path))


def copy_recipe(name: str | Path, destination: str | Path, *, force: bool = False) -> Path:
    """Copy a recipe to start one's own from; return the new file.

    Args:
        destination: a file to be, or a folder that exists.
        force: replace a file that is already there.
    Raises:
        RecipeError: there is no such recipe, or the destination is taken or cannot be written.
    """
    source = _find(name)
    text = _read_text(source)
    target = Path(destination)
    if target.is_dir():
        target = target / source.name
    if target.suffix != ".yaml":
        raise RecipeError(
            f"Expected a destination that ends in .yaml, found {target}. Try {target.with_suffix('.yaml')}"
        )
    if target.exists() and not force:
        raise RecipeError(f"{target} exists already. Choose another name, or use --force to replace it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            file.write(text.encode())
    except OSError as error:
        raise RecipeError(f"Cannot write {target}: {error.strerror}.") from error
    return target


def build_file_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors.

    A file may leave to its parent whatever it does not change, so no key is required here; whether a recipe is
    complete shows when it is checked.
    """
    file_schema = _drop_required(copy.deepcopy(recipe_schema()))
    assert isinstance(file_schema, dict)
    file_schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "A shipped recipe, or a file beside or below this one, whose keys this recipe starts from.",
        },
        **file_schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **file_schema, "title": "peft-combo recipe"}


# Finding.


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.endswith((".yaml", ".yml"))


def _find(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and not _is_path(name_or_path):
        return _find_shipped(name_or_path)
    path = Path(name_or_path)
    if _is_file(path):
        return path
    remedy = f" Did you mean the shipped recipe: {path.stem}?" if path.stem in list_shipped_recipes() else ""
    raise RecipeError(f'No recipe file "{make_printable(str(path))}".{remedy}')


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _find_shipped(name: str) -> Path:
    names = list_shipped_recipes()
    if name in names:
        return recipes_folder() / f"{name}.yaml"
    message = f"No recipe {format_value(name)}. Shipped: {', '.join(names)}. {did_you_mean(name, names)}".strip()
    if _is_file(Path(f"{name}.yaml")):
        message += f"\nTo use the file of that name, write: --recipe {name}.yaml"
    raise RecipeError(f"{message}\nSee them with: peft-combo recipes list")


# Inheriting and overriding.


def _read_with_parents(file: Path) -> dict[str, Any]:
    """Return the keys of a recipe over those of what it extends, and of what that extends."""
    chain = [file]
    layers = [_read_mapping(file)]
    while "extends" in layers[-1]:
        parent = _find_parent(chain[-1], layers[-1].pop("extends"))
        if any(parent.samefile(earlier) for earlier in chain):
            names = " -> ".join(one.name for one in [*chain, parent])
            raise _build_error(chain[-1], "extends", f"expected a recipe that does not lead back here, found {names}.")
        if len(chain) > _MAX_PARENTS:
            raise _build_error(chain[-1], "extends", f"expected at most {_MAX_PARENTS} recipes in a row.")
        chain.append(parent)
        layers.append(_read_mapping(parent))
    raw: dict[str, Any] = {}
    for layer in reversed(layers):
        raw.pop("name", None)  # a parent's name is not its child's
        raw = _merge(raw, layer)
    return {"name": file.stem, **raw}


def _find_parent(file: Path, extends: object) -> Path:
    if not isinstance(extends, str) or not extends or not extends.isprintable() or len(extends) > 255:
        expected = "expected the name of a shipped recipe, or a file beside this one"
        raise _build_error(file, "extends", f"{expected}; found {format_value(extends)}.")
    if not _is_path(extends):
        names = list_shipped_recipes()
        if extends in names:
            return recipes_folder() / f"{extends}.yaml"
        remedy = did_you_mean(extends, names) or f"A file is written with its ending: {extends}.yaml"
        problem = f"expected one of {', '.join(names)}, or a file beside this one; found {format_value(extends)}."
        raise _build_error(file, "extends", problem, remedy)
    home = file.resolve().parent
    parent = home / extends
    try:
        # Resolved first: a symbolic link out of the folder leaves it as surely as "..".
        inside = not Path(extends).is_absolute() and parent.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # links that lead to each other
        inside = False
    if not inside:
        raise _build_error(
            file, "extends", f"expected a file beside or below this recipe, found {format_value(extends)}."
        )
    if not parent.is_file():
        beside = [str(one.relative_to(home)) for one in home.glob("*.yaml") if one != file.resolve()]
        remedy = did_you_mean(extends, beside)
        raise _build_error(
            file, "extends", f"expected a file beside this recipe, found no {format_value(extends)}.", remedy
        )
    return parent


# What else goes when one key changes: the rest of `adapter` belongs to its method, and of `data`, these to its source.
_BELONGS_TO = {
    ("adapter", "method"): None,
    ("task", "kind"): None,
    ("data", "source"): ("path", "columns", "category_filter", "departments"),
}


def _merge(parent: Mapping[str, Any], child: Mapping[str, Any], at: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `parent` with the keys of `child` laid over it, mapping by mapping; lists are replaced."""
    kept = dict(parent)
    for (section, key), dependent in _BELONGS_TO.items():
        if at == (section,) and key in child and child[key] != parent.get(key):
            for gone in list(kept) if dependent is None else dependent:
                kept.pop(gone, None)
    for key, value in child.items():
        below = kept.get(key)
        if isinstance(value, dict):
            kept[key] = _merge(below if isinstance(below, dict) else {}, value, (*at, key))
        else:
            kept[key] = value
    return kept


def _read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the overrides as one nested mapping, to be merged as a child recipe would be."""
    tree: dict[str, Any] = {}
    faults = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(re.fullmatch(r"[\w@+-]+", key) for key in keys) or len(keys) > MAX_DEPTH:
            faults.append(Fault(f"--set {format_value(override)}", "expected KEY=VALUE.", "As in training.epochs=2."))
            continue
        if keys == ["extends"]:
            faults.append(Fault("extends", "expected a key of the recipe.", "What it extends is set in the file."))
            continue
        if not text.strip():  # of a variable that is not set, perhaps
            faults.append(Fault(".".join(keys), "expected a value after =, found nothing.", "Write null for none."))
            continue
        try:
            value = _read_override(text.strip())
        except YamlFault as fault:
            faults.append(Fault(".".join(keys), f"cannot read {format_value(text)}: {fault}."))
            continue
        for key in reversed(keys):
            value = {key: value}
        tree = _lay_over(tree, value)
    if faults:
        raise RecipeError.from_faults("The overrides cannot be read:", faults)
    return tree


def _read_override(text: str) -> Any:
    if text.startswith("{") and ":" in text:  # a mapping; "{title} {category}" is a template
        try:
            value = read_yaml(text)
        except YamlFault:
            if not text.endswith("}") or text.count("{") > 1:  # "{title}: {price}"
                return read_scalar(text)
            raise
        if isinstance(value, dict) and any(":" in key for key, entry in value.items() if entry is None):
            raise YamlFault("expected a blank after each colon, as in {rank: 4}")
        return value if isinstance(value, dict) else read_scalar(text)
    return read_yaml(text) if text.startswith(("[", '"', "'")) or text == "{}" else read_scalar(text)


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of both, the later ones where both name a key."""
    found = dict(below)
    for key, value in above.items():
        there = found.get(key)
        found[key] = _lay_over(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return found


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(_read_text(file))
    except YamlFault as fault:
        where = f"{_format_path(file)}:{fault.line}" if fault.line else _format_path(file)
        raise RecipeError.from_faults(
            f"Recipe {_format_path(file)} cannot be read:", [Fault(where, f"{fault}.")]
        ) from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else format_value(raw)
        raise _build_error(
            file, _format_path(file), f"expected keys such as category, data and adapter; found {found}."
        )
    return raw


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"Cannot read {_format_path(file)}: {error.strerror}.") from error
    if len(content) > _MAX_BYTES:
        size = f"expected at most {_MAX_BYTES // 1024} KiB, found more."
        raise _build_error(file, _format_path(file), size, "Is this a recipe?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"expected UTF-8 text, found the byte 0x{content[error.start]:02x}."
        raise _build_error(file, f"{_format_path(file)}:{line}", problem, "Save the file as UTF-8.") from None


def _format_path(file: Path) -> str:
    return make_printable(str(file))


def _build_error(file: Path, where: str, problem: str, remedy: str = "") -> RecipeError:
    return RecipeError.from_faults(f"Recipe {_format_path(file)} cannot be read:", [Fault(where, problem, remedy)])


# Writing and describing.


def _drop_required(node: Any) -> Any:
    # oneOf becomes anyOf: without a required `method`, a child's `adapter: {rank: 4}` matches more than one member.
    if isinstance(node, dict):
        renamed = {"anyOf" if key == "oneOf" else key: _drop_required(value) for key, value in node.items()}
        if isinstance(renamed.get("required"), list):
            del renamed["required"]
        return renamed
    return [_drop_required(entry) for entry in node] if isinstance(node, list) else node


def check_destination(path: Path) -> Path:
    """Return a path that `write_recipe` may write to; ask before a long job, not after it.

    Raises:
        RecipeError: it does not end in .yaml, or is taken. PeftComboError: the file cannot be written.
    """
    if path.suffix != ".yaml":
        raise RecipeError(f"Expected a destination that ends in .yaml, found {path}. Try {path.with_suffix('.yaml')}")
    if path.exists():
        raise RecipeError(f"{path} exists already. Choose another name, or remove it first.")
    return check_file_target(path)


def write_recipe(recipe: Recipe, path: Path, header: Sequence[str] = ()) -> Recipe:
    """Write every key of a recipe, under the name of its file, and read it back.

    Args:
        header: comment lines that open the file.
    Returns:
        the recipe as `load_recipe` reads it from there: equal but for the name.
    Raises:
        RecipeError: see `check_destination`. PeftComboError: it cannot be written.
    """
    check_destination(path)
    name = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")[:64] or recipe.name
    named = recipe.model_copy(update={"name": name})
    lines = [f"# {line}".rstrip() for line in header] + _format_lines(named.model_dump(mode="json"))
    write_text(path, "\n".join(lines) + "\n")
    return load_recipe(path)


def _format_lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        # Column names are a user's own and may hold anything; every JSON text is a quoted YAML one.
        written = key if re.fullmatch(r"[A-Za-z_][\w-]*", key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{written}:", *_format_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{written}: {json.dumps(value, ensure_ascii=False)}")
    return lines
