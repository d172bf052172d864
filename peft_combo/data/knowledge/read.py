"""Reading of what a data folder tells beside its tables: `rules.yaml` and `relations.csv`."""

from __future__ import annotations

from pathlib import Path

from peft_combo.data.knowledge.clashes import find_clashes
from peft_combo.data.knowledge.relations import read_relations
from peft_combo.data.knowledge.rule_set import Knowledge, RuleSet, check_names
from peft_combo.data.knowledge.rules import RULES_FILE, Rule, read_rules
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError, Fault


def read_knowledge(folder: Path, catalog: Catalog, faults: list[Fault], notes: list[str]) -> Knowledge | None:
    """Read rules and relations of a folder; None where there is neither.

    Args:
        catalog: that they speak of, nothing filtered.
        faults: gets what is wrong, rules that clash among it. notes: gets what was left out.
    """
    before = len(faults)
    relations = read_relations(folder, catalog, faults, notes)
    path = folder / RULES_FILE
    rules: tuple[Rule, ...] = ()
    if path.is_file():
        try:
            rules = read_rules(path)
        except DataError as error:
            faults += error.faults
    if len(faults) > before or not (rules or relations):
        return None
    knowledge = Knowledge(rules, relations)
    faults += check_names(knowledge, catalog)
    if len(faults) == before:
        for names, count in find_clashes(RuleSet.of(knowledge, catalog)).items():
            told = " and ".join(f'"{name}"' for name in names)
            items = "the item it is" if count == 1 else f"any of the {count:,} items they are"
            faults.append(
                Fault(RULES_FILE, f"{told} clash: no bundle can hold {items} about.", "Change or soften one (weight).")
            )
    return knowledge
