"""What hard rules cost and give: bundles composed with and without them, on validation bundles.

    python -m benchmarks.rules FOLDER --rule "matches: gender"

Of every validation bundle one item is given and the rest composed, of the size it has, by the composer that `recommend`
uses. Relevance is CEASE over TF-IDF titles in the setting that is best on validation, compatibility is not asked, and
the weights of the objective are the fixed ones: what differs between the two lines is the rules alone. Prints the share
of composed and of real bundles that break a rule, and the recall of the items left out, with a paired permutation test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from peft_combo.data.knowledge.rule_set import Knowledge, RuleSet
from peft_combo.data.knowledge.rules import parse_rules
from peft_combo.data.queries import Queries
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split
from peft_combo.metrics import paired_permutation
from peft_combo.recipe.model import DataConfig
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.openings import Openings, compose_openings, measure_recall
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.model_selection import list_scorers, select_setting
from peft_combo.recommender.scorer_id import PEER


def main() -> None:
    """Read the arguments, compose twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="data folder; the demo where none is given")
    parser.add_argument("--rule", action="append", default=[], help='a rule as in rules.yaml, "matches: gender"')
    parser.add_argument("--rules", type=Path, help="file of rules, beside those of --rule")
    parser.add_argument("--seed", type=int, default=0, help="of the item that is given")
    parser.add_argument("--smoke", action="store_true", help="a few bundles of the demo")
    own = parser.parse_args()
    dataset = demo_dataset() if own.folder is None else open_dataset(DataConfig(source="folder", path=str(own.folder)))
    text = "rules:\n" + "".join(f"  - {{{rule}}}\n" for rule in own.rule or ([] if own.rules else ["matches: gender"]))
    rules = parse_rules(text) if own.rules is None else parse_rules(own.rules.read_text(encoding="utf-8"))
    known_rules = RuleSet.of(Knowledge(rules), dataset.catalog)
    parts = split(dataset)
    known = FitData.of(dataset, parts.train, parts.train_interactions, None, {})
    valid = Queries.of(dataset.bundles, parts.valid[: 10 if own.smoke else None])
    selected = select_setting(list_scorers(known, set(), 0)[PEER][: 1 if own.smoke else None], valid)
    openings = Openings.of(valid, own.seed)
    scores = selected.fitted(openings.queries)
    seen = [dataset.bundles.items[row] for row in parts.train]
    found = {}
    for name, used in (("without rules", None), ("with rules", known_rules)):
        composer = Composer.learn(dataset.catalog, seen, history=known.history, rules=used)
        composed = compose_openings(openings, composer, scores, None, Options(k=1))
        whole = [[given, *added] for given, added in zip(openings.given.tolist(), composed, strict=True)]
        broken = np.mean([_breaks(known_rules, rows) for rows in whole])
        recall = measure_recall(composed, openings)
        exact = np.mean([set(a) == set(w.tolist()) for a, w in zip(composed, openings.wanted, strict=True)])
        none = sum(not added for added in composed)
        found[name] = recall
        print(f"{name}: {broken:.1%} break a rule, recall {recall.mean():.4f}, whole {exact:.4f}, {none} not composed")
    real = [[given, *wanted.tolist()] for given, wanted in zip(openings.given.tolist(), openings.wanted, strict=True)]
    share = np.mean([_breaks(known_rules, rows) for rows in real])
    p = paired_permutation(found["with rules"], found["without rules"], openings.groups)
    print(f"{len(openings)} validation bundles, of which {share:.1%} break a rule themselves; p of recall {p:.3f}")


def _breaks(rules: RuleSet, rows: list[int]) -> bool:
    """Say whether a bundle breaks a hard rule."""
    return any(one.is_broken(rows) for one in rules.hard)


if __name__ == "__main__":
    main()
