"""Model card: the README.md of a stored adapter, as PEFT and the hub expect it."""

from __future__ import annotations

import json
import re
from typing import TypeGuard

from pydantic import JsonValue

from peft_combo.errors import shorten
from peft_combo.store.manifest import BackboneStamp, ImportStamp, JsonObject, Manifest

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")


# --- the model card ---------------------------------------------------------------------------------------------------


def render_model_card(manifest: Manifest) -> str:
    """Write the `README.md` of a version from its manifest alone: what it is, how good, how to load it.

    It opens with the front matter model hubs read. The recipe is left to the manifest, since it may hold local paths.
    """
    backbone, data, imported = manifest.backbone, manifest.data, manifest.imported
    with_peft = "adapter_config.json" in manifest.files
    front = [
        "---",
        f"library_name: {'peft' if with_peft else 'peft-combo'}",
        # "embedded" or a folder is not a model a hub could link to.
        *([f"base_model: {json.dumps(backbone.model)}"] if _is_hub_id(backbone.model) else []),
        "pipeline_tag: feature-extraction",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(("peft-combo", manifest.method, manifest.stored_as))),
        "---",
    ]
    kind = manifest.task.get("kind")
    facts = {
        "Category": manifest.category,
        "Method": manifest.method,
        "Stored as": manifest.stored_as,
        "Task": kind if isinstance(kind, str) else "not said",
        "Backbone": f"{backbone.model} ({backbone.model_type}, {backbone.layers} layers, {backbone.dim} dimensions)",
        "Backbone fingerprint": backbone.fingerprint,
        "Pooling": f"{backbone.pooling}, at most {backbone.max_length} tokens",
        **({"Text prefix": json.dumps(backbone.text_prefix)} if backbone.text_prefix else {}),
        "Quantization while tuning": backbone.quantization,
        "Data": data.name,
        "Data digest": data.digest,
        "Split digest": data.split_digest,
        **({} if imported is None else _describe_origin(imported)),
        "Created": manifest.created.isoformat(),
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())) or "not said",
    }
    body = [
        f"# {manifest.reference}",
        "",
        f"A {_escape_cell(manifest.method)} adapter for the category `{manifest.category}`, "
        f"{'tuned with' if imported is None else 'imported into'} peft-combo for {_PURPOSES.get(str(kind), 'a task')}.",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_escape_cell(value)} |" for name, value in facts.items()),
        "",
        "The whole recipe is in `manifest.json`."
        if imported is None
        else "It was tuned elsewhere: what it learned from, and whether it saw these bundles, is not known.",
        "",
        "## How good it is",
        "",
        *(_render_metrics(manifest.metrics) if manifest.metrics or imported is None else ["Not measured."]),
        "",
        "## How to load it",
        "",
        *_explain_loading(manifest, with_peft),
    ]
    return "\n".join((*front, "", *body)) + "\n"


_PURPOSES = {
    "bundle": "bundle recommendation",
    "classification": "classification",
    "tagging": "tagging",
    "rating": "rating",
    "sequence": "writing bundles item by item",
    "masked": "reading texts without labels",
    "matching": "answers to questions",
}


def _describe_origin(imported: ImportStamp) -> dict[str, str]:
    return {
        "Imported from": f"{imported.folder} (sha256 of its weights {imported.sha256})",
        "Base model, by its own account": imported.base_model or "not said",
        "Written by": f"PEFT {imported.peft_version}" if imported.peft_version else "not said",
    }


def _render_metrics(metrics: JsonObject) -> list[str]:
    """Baselines, the encoder before, the adapter after: one row each, one column per metric."""
    baselines = metrics.get("baselines")
    rows: dict[str, dict[str, str]] = {}
    for name, figures in baselines.items() if isinstance(baselines, dict) else ():
        rows[f"{_escape_cell(name)} (baseline)"] = _format_figures(figures)
    rows["backbone before tuning"] = _format_figures(metrics.get("before"))
    rows["**this adapter**"] = _format_figures(metrics.get("after"))
    rows = {name: figures for name, figures in rows.items() if figures}
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    if not columns:
        return ["No figures were recorded."]
    table = [
        "| | " + " | ".join(_escape_cell(column) for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |" for name, row in rows.items()),
    ]
    match metrics.get("protocol"):
        case str(text):
            table += ["", f"Protocol: {_escape_cell(text, 1000)}"]
        case dict(parts):
            said = "; ".join(f"{name}: {value}" for name, value in parts.items())
            table += ["", f"Protocol: {_escape_cell(said, 1000)}"]
        case _:
            table += ["", "Protocol: not recorded."]
    return table


def _format_figures(values: JsonValue) -> dict[str, str]:
    figures = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        interval = ""
        if isinstance(value, dict):
            low, high = value.get("low"), value.get("high")
            if _is_number(low) and _is_number(high):
                interval = f" ({low:.3f} to {high:.3f})"
            value = value.get("value")
        if _is_number(value):
            figures[name] = f"{value:.3f}{interval}"
    return figures


def _is_number(value: JsonValue) -> TypeGuard[int | float]:
    # A bound keeps an absurd integer from a hand-written manifest out of the float formatting.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _explain_loading(manifest: Manifest, with_peft: bool) -> list[str]:
    backbone = manifest.backbone
    ours = [
        "```python",
        "from peft_combo import AdapterStore, Backbone",
        "",
        f"backbone = Backbone.load({_format_load_arguments(backbone)})",
        f'adapter = backbone.attach(AdapterStore("adapters").open("{manifest.reference}"))',
        'vectors = backbone.encode(["a product title"], adapter)',
        "```",
    ]
    if not with_peft:
        return ["With peft-combo:", "", *ours]
    where = "" if _is_hub_id(backbone.model) else " (the name is what peft-combo calls it; give the folder it lies in)"
    plain = [
        "With PEFT alone:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModel",
        "",
        f"encoder = AutoModel.from_pretrained({json.dumps(backbone.model)})",
        'encoder = PeftModel.from_pretrained(encoder, ".")  # this folder',
        "```",
        "",
        f"Pool its last hidden state by {_escape_cell(backbone.pooling)} over at most {backbone.max_length} tokens"
        + (", the virtual ones in front left out. " if manifest.stored_as in ("prompt_tuning", "p_tuning") else ". ")
        + (f"Every text begins with {_escape_cell(json.dumps(backbone.text_prefix))}. " if backbone.text_prefix else "")
        + f"The encoder has to be the one named above{where}: PEFT does not notice another of the same shape.",
        "",
    ]
    return [*plain, "With peft-combo, which checks files and encoder:", "", *ours]


def _format_load_arguments(backbone: BackboneStamp) -> str:
    """Return what `Backbone.load` needs to make the encoder named here; its own default needs nothing."""
    default = backbone.model == "sentence-transformers/all-MiniLM-L6-v2"
    model = "" if default else json.dumps(backbone.model)
    # Without a word on it a base pools as it says of itself, which need not be how the adapter was tuned.
    pooling = "" if default and backbone.pooling == "mean" else f'pooling="{backbone.pooling}"'
    prefix = f"text_prefix={json.dumps(backbone.text_prefix)}" if backbone.text_prefix else ""
    return ", ".join(filter(None, (model, pooling, prefix)))


def _is_hub_id(model: str) -> bool:
    return model not in ("embedded", "embedded-multilingual") and _HUB_ID.fullmatch(model) is not None


def _escape_cell(text: str, limit: int = 300) -> str:
    """Text from outside, made fit for a cell of a Markdown table."""
    return re.sub(r"([|\\`*<>\[\]])", r"\\\1", shorten(text, limit))
