"""Rules of bundles: the typed language of `rules.yaml`, read and checked as recipes are.

Owns what a rule may say and how its file is read: every fault at once, with its place and the nearest valid name. Knows
no items: what the names in a rule mean in a catalogue is for `rule_set`.

    rules:
      - matches: gender                    # without a weight: hard, no bundle breaks it
      - when: {category: Cameras > Tripods}
        requires: {category: Cameras}
      - when: {attributes: {brand: Acme}}
        excludes: {attributes: {brand: Apex}}
        weight: 2                          # soft: a bundle that breaks it loses so much
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from peft_combo.errors import DataError, Fault
from peft_combo.recipe.fields import Real, Section, Text, fault, format_value
from peft_combo.recipe.violations import SchemaReader
from peft_combo.recipe.yaml import YamlFault, read_yaml

RULES_FILE = "rules.yaml"
_MAX_BYTES = 256 * 1024
_MOST_RULES = 200

RuleKind = Literal["requires", "excludes", "matches"]


class ItemSelector(Section):
    """Which items a rule speaks of: those that meet every condition that is given.

    Attributes:
        category: path that begins the item's, as "A > B".
        slot: part it plays in a bundle.
        item: outside id.
        attributes: values it has; case does not count. What titles and categories say of gender, age, season, size and
            the like counts where the items have no such attribute (`data.traits`).
        related: relation of `relations.csv` in which the item of `when` is the head and this one the tail; only of
            `requires` and `excludes`.
    """

    category: Text | None = None
    slot: Text | None = None
    item: Text | None = None
    attributes: dict[Text, Text] = Field(default_factory=dict)
    related: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise fault(f"expected at least one of {', '.join(type(self).model_fields)}; found nothing.")
        return self

    def __str__(self) -> str:
        named = (("category", self.category), ("slot", self.slot), ("item", self.item), ("related", self.related))
        told = [f"{name} {value}" for name, value in named if value is not None]
        return ", ".join([*told, *(f"{name} {value}" for name, value in self.attributes.items())])


class Rule(Section):
    """One rule of bundles; exactly one of `requires`, `excludes` and `matches`.

    Attributes:
        name: what messages and explanations call it; None makes one of what it says.
        when: items it is about; None is about all.
        requires: beside each item of `when` a bundle holds one of these.
        excludes: beside an item of `when` a bundle holds none of these.
        matches: attribute in which the items of `when` have one value, where theirs is known.
        weight: what breaking it takes from the score of a bundle; None for a hard rule, which no bundle breaks.
    """

    name: Text | None = None
    when: ItemSelector | None = None
    requires: ItemSelector | None = None
    excludes: ItemSelector | None = None
    matches: Text | None = None
    weight: Annotated[Real, Field(gt=0, le=1000)] | None = None

    @model_validator(mode="after")
    def _is_one_rule(self) -> Self:
        kinds = [kind for kind in ("requires", "excludes", "matches") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            raise fault(f"expected one of requires, excludes, matches; found {found}.", "Make a rule of each.")
        if self.when is not None and self.when.related is not None:
            raise fault(
                "expected no related in when; found one.", "It belongs under requires or excludes: related to what?"
            )
        if self.requires is not None and self.when is None:
            raise fault("expected when beside requires; found nothing.", "Say which items require it.")
        return self

    @property
    def kind(self) -> RuleKind:
        """Which of the three it is."""
        return "requires" if self.requires is not None else "excludes" if self.excludes is not None else "matches"

    @property
    def target(self) -> ItemSelector | None:
        """What is required or excluded; None where values are to match."""
        return self.requires or self.excludes

    @property
    def hard(self) -> bool:
        """Whether no bundle may break it."""
        return self.weight is None

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        what = self.matches if self.target is None else f"({self.target})"
        return f"{self.kind} {what}" + (f" when ({self.when})" if self.when is not None else "")


class RuleFile(Section):
    """What `rules.yaml` holds."""

    rules: Annotated[tuple[Rule, ...], Field(max_length=_MOST_RULES)] = ()

    @model_validator(mode="after")
    def _has_names_apart(self) -> Self:
        names = [str(rule) for rule in self.rules]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise fault(
                    f"expected distinct rules; found {format_value(name)} twice.", "Leave one out, or give it a name.",
                    f"rules.{place}",
                )  # fmt: skip
        return self


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Read a file of rules.

    Raises:
        DataError: it cannot be read or does not hold together; every fault is in the message.
    """
    title = f"The rules in {path.name} cannot be read:"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError.from_faults(title, [Fault(path.name, f"cannot be read: {reason}.")]) from error
    if len(content) > _MAX_BYTES:
        raise DataError.from_faults(
            title, [Fault(path.name, f"expected at most {_MAX_BYTES // 1024} KiB, found more.")]
        )
    return parse_rules(text, path.name)


def parse_rules(text: str, name: str = RULES_FILE) -> tuple[Rule, ...]:
    """Parse rules.

    Args:
        name: what faults call the file.
    Raises:
        DataError: the text does not hold together; every fault is in the message.
    """
    title = f"The rules in {name} do not hold together:"
    try:
        raw = read_yaml(text)
    except YamlFault as problem:
        where = f"{name}:{problem.line}" if problem.line else name
        raise DataError.from_faults(title, [Fault(where, f"{problem}.")]) from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else format_value(raw)
        raise DataError.from_faults(
            title, [Fault(name, f"expected the key rules with a list, found {found}.", "Begin the file with: rules:")]
        )
    try:
        return RuleFile.model_validate(raw).rules
    except ValidationError as error:
        faults = [_read_schema().explain(details) for details in error.errors(include_url=False)]
    named = dict.fromkeys(Fault(f"{name}: {one.where}", one.problem, one.remedy) for one in faults)
    raise DataError.from_faults(title, named)


@lru_cache(maxsize=1)
def _read_schema() -> SchemaReader:
    return SchemaReader(RuleFile.model_json_schema(), "file of rules")


def format_rules(rules: Sequence[Rule], comments: Sequence[str] = ()) -> str:
    """Write rules as `rules.yaml` has them, which `parse_rules` reads back as the same.

    Args:
        comments: one for each rule, or none.
    """
    lines = ["rules:"] if rules else ["rules: []"]
    for place, rule in enumerate(rules):
        if comments:
            lines.append(f"  # {comments[place]}")
        fields = rule.model_dump(exclude_none=True, exclude_defaults=True)
        written = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()
        ]  # YAML reads JSON
        lines += [("  - " if number == 0 else "    ") + line for number, line in enumerate(written)]
    return "\n".join(lines) + "\n"
