"""A conditional random field beside the tagging task: the same texts, the same split, the features of its own baseline.

    pip install python-crfsuite                                   # not a dependency of the package
    python benchmarks/tagging_crf.py --data FOLDER                # recipe tag-fashion; --set as for `peft-combo tune`

The field adds to the word-window baseline of the report what that one lacks: a tag depends on the tag before. The
weights of its L1 and L2 penalties are chosen on the validation texts; the test texts are tagged once.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _smoke import add_smoke

from peft_combo.data.labels.tags import TaggedText, entities
from peft_combo.data.labels.texts import split_texts
from peft_combo.data.task_data import read_tagged
from peft_combo.metrics.classification import f1_values, interval, micro_f1, totals
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.task import TaggingTask
from peft_combo.tuning.tasks.tagging import Tags, count_entities, extract_word_features


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="tag-fashion")
    options.add_argument("--data")
    options.add_argument("--set", action="append", default=[], dest="overrides")
    add_smoke(options)
    given = options.parse_args()
    recipe = load_recipe(given.recipe, given.overrides, given.data)
    assert isinstance(recipe.task, TaggingTask)
    texts = read_tagged(recipe.data, recipe.task).texts
    weights = list(itertools.product((0.0, 0.01, 0.1, 1.0), (0.001, 0.01, 0.1)))
    if given.smoke:
        texts, weights = texts[:100], weights[4:5]
    parts = split_texts([one.text for one in texts], recipe.data)
    train, valid, test = ([texts[row] for row in rows] for rows in (parts.train, parts.valid, parts.test))

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (l1, l2) in enumerate(weights):
            tagger = fitted(train, l1, l2, Path(folder) / f"{number}.crf")
            found.append((f1(valid, tagged(tagger, valid)), l1, l2, tagger))
            print(f"L1 {l1:g}, L2 {l2:g}: F1 {found[-1][0]:.4f} on {len(valid):,} validation texts", flush=True)
        best = max(found, key=lambda one: one[0])
        said = tagged(best[3], test)
    counts = counted(test, said)
    low, high = interval(counts, micro_f1)
    print(f"CRF with L1 {best[1]:g}, L2 {best[2]:g}: F1 {f1(test, said):.4f} [{low:.4f}, {high:.4f}]")
    known = {words for one in train for words in named(one)}
    fresh = [
        (place, one) for place, text in enumerate(test) for words, one in named(text).items() if words not in known
    ]
    right = sum(one in entities(said[place]) for place, one in fresh)
    print(f"of {len(fresh)} entities whose words name none in training it finds {right / max(1, len(fresh)):.3f}")


def fitted(texts: Sequence[TaggedText], l1: float, l2: float, file: Path) -> Any:
    pycrfsuite = importlib.import_module("pycrfsuite")  # by name: the type checker need not have it
    trainer = pycrfsuite.Trainer(verbose=False)
    for one in texts:
        trainer.append(extract_word_features(one), list(one.tags))
    trainer.set_params({"c1": l1, "c2": l2, "max_iterations": 200, "feature.possible_transitions": True})
    trainer.train(str(file))
    tagger = pycrfsuite.Tagger()
    tagger.open(str(file))
    return tagger


def tagged(tagger: Any, texts: Sequence[TaggedText]) -> list[Tags]:
    return [tuple(tagger.tag(extract_word_features(one))) for one in texts]


def counted(texts: Sequence[TaggedText], said: Sequence[Tags]) -> Any:
    types = sorted({kind for one in texts for kind, _, _ in entities(one.tags)})
    return count_entities([one.tags for one in texts], said, types)


def f1(texts: Sequence[TaggedText], said: Sequence[Tags]) -> float:
    return f1_values(totals(counted(texts, said)))["f1"]


def named(one: TaggedText) -> dict[Tags, tuple[str, int, int]]:
    words = tuple(token.casefold() for token in one.tokens)
    return {words[entity[1] : entity[2]]: entity for entity in entities(one.tags)}


if __name__ == "__main__":
    main()
