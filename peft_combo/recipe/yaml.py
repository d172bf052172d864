"""Safe YAML reading with line numbers and limits on size and depth."""

from __future__ import annotations

import re
from typing import Any

import yaml

from peft_combo.recipe.fields import format_step, format_value

MAX_DEPTH = 16
_MAX_KEYS = 500


# Reading YAML. The subset a recipe needs, read from the parser's events: PyYAML's own constructors take `no` for
# False and 1e-4 for text, keep the last of two equal keys, and follow aliases that can unfold a line into gigabytes.


class YamlFault(Exception):
    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def read_yaml(text: str) -> Any:
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        next(events)  # the stream starts
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = _read_value(next(events), events, depth=0)
        next(events)  # the document ends
        if isinstance(next(events), yaml.DocumentStartEvent):
            raise YamlFault("expected one document, found a second after ---")
        return value
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlFault(f"expected printable text, found the character {error.character:#x}", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise YamlFault(f"not valid YAML: {error.problem}", None if mark is None else mark.line + 1) from None
    except (ValueError, OverflowError):  # PyYAML's reading of escapes such as "\UFFFFFFFF"
        raise YamlFault("not valid YAML: an escape names no character") from None


def _read_value(event: yaml.Event, events: Any, depth: int) -> Any:
    line = _find_line(event)
    if depth > MAX_DEPTH:
        raise YamlFault(f"expected at most {MAX_DEPTH} levels, found more", line)
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        raise YamlFault("anchors (&) and aliases (*) are not read in recipes; quote a text that starts so", line)
    if tag := getattr(event, "tag", None):
        raise YamlFault(f"tags such as {format_value(tag)} are not read in recipes", line)
    if isinstance(event, yaml.ScalarEvent):
        return read_scalar(event.value, line) if event.style is None else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        entries = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            entries.append(_read_value(event, events, depth + 1))
        return entries
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = _find_line(event)
        if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
            raise YamlFault("expected a plain key", line)
        key = event.value  # always text, so that a key `no` or `1` stays what was written
        if key in mapping:
            raise YamlFault(f"the key {format_step(key)} is given twice", line)
        if len(mapping) == _MAX_KEYS:
            raise YamlFault(f"expected at most {_MAX_KEYS} keys together, found more", line)
        mapping[key] = _read_value(next(events), events, depth + 1)
    return mapping


def _find_line(event: yaml.Event) -> int | None:
    return None if event.start_mark is None else event.start_mark.line + 1


def read_scalar(text: str, line: int | None = None) -> Any:
    """Read an unquoted value by YAML 1.2's core rules: true, null, 12, 1e-4; `no`, `on` and dates are text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text, re.ASCII):
        if len(text) > 100:
            raise YamlFault("expected a number, found very many digits", line)
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", "").lower())
    return text
