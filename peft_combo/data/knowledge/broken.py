"""Rules that a dataset's own bundles break."""

from __future__ import annotations

from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.model import Dataset


def describe_broken(dataset: Dataset) -> list[str]:
    """Say of each rule that bundles of the dataset break how many do, and which first; an empty list for none."""
    rules, bundles = RuleSet.of(dataset.knowledge, dataset.catalog), dataset.bundles
    told = []
    for one in rules.rules:
        broken = [place for place, rows in enumerate(bundles.items) if one.is_broken(rows.tolist())]
        if broken:
            kind = "hard" if one.rule.hard else "soft"
            told.append(
                f'{kind} rule "{one.rule}" is broken by {len(broken):,} of {len(bundles):,} bundles, first by '
                f"{bundles.bundle_ids[broken[0]]}"
            )
    return told
