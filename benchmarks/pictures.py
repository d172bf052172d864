"""What pictures add on the drawn demo: text, picture and both, before and after tuning, on test bundles.

    python benchmarks/pictures.py            # three splits by user, nine runs of about a minute and a half
    python benchmarks/pictures.py --folder KEPT    # what each run gave is kept there; an ended one goes on

The shop is made up so that outfits match by colour and pattern, which texts hide or tell half of the time
(`tools/make_demo_pictures.py`): that pictures help here is by construction, and the figures say that they are read.

text: `lora-fashion-pictures` without its image model. picture: every title is the same word, so that texts tell
nothing apart. both: the recipe. Each is tuned on the training bundles of a split, validation chooses the step, and the
test bundles are asked once: every item of every bundle is the answer once, ranked among the whole catalogue without
the rest of its bundle. Intervals are by bootstrap over users, p by paired permutation of users, all splits together.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _smoke import add_smoke, make_tiny
from made_up import build_pictured_shop, build_vision
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.completion import BundleHead, rank_targets
from peft_combo.encoder.heads.pictures import WIDTH, PictureView
from peft_combo.encoder.vectors import VectorCache
from peft_combo.files import write_text
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask
from peft_combo.recommender.item_pictures import append_pictures, encode_looks
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune
from peft_combo.tuning.tasks.bundle import BundleCompletion

CASES = {"text": ("backbone.image_model=null",), "picture": (), "both": ()}
SEEDS = (110, 111, 112)
METRICS = ("ndcg@10", "r@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps what each run gave; one that was ended goes on")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="as of peft-combo tune")
    add_smoke(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.smoke:
        with make_tiny() as tiny:
            vision = build_vision(tiny.folder / "vision", "resnet")
            (tiny.folder / "pictured").mkdir()
            shop = build_pictured_shop(tiny.folder / "pictured")
            changes = (*tiny.changes[:-1], f"backbone.image_model={vision}", "data.source=folder", f"data.path={shop}",
                       "data.text={title}", "task.extra_negatives=0")  # fmt: skip
            print(tabulate({(name, 0): measure(name, 0, changes, tiny.folder) for name in CASES}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, changes = options.folder or Path(scratch), tuple(options.changes)
        print(tabulate({(name, seed): measure(name, seed, changes, folder) for seed in SEEDS for name in CASES}))


def measure(name: str, seed: int, changes: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Tune one case on one split; return ranks of the test answers before and after, with their users."""
    kept = folder / f"{name}-{seed}.json"
    if kept.exists():
        content: dict[str, Any] = json.loads(kept.read_text())
        return content
    store = folder / f"store-{name}-{seed}"
    recipe = load_recipe("lora-fashion-pictures", (*changes, *CASES[name], f"data.split_seed={seed}", f"store={store}"))
    dataset = open_dataset(recipe.data)
    parts = split_as(dataset, recipe.data)
    if name == "picture":
        catalog = replace(
            dataset.catalog, titles=("item",) * len(dataset.catalog), categories=((),) * len(dataset.catalog)
        )
        dataset = replace(dataset, catalog=catalog)
    assert isinstance(recipe.task, BundleTask)
    task = BundleCompletion(recipe, recipe.task, (dataset, parts))
    record = tune(recipe, task=task, run_folder=folder / f"run-{name}-{seed}").record
    bank = AdapterBank(Backbone.of(recipe.backbone), AdapterStore(recipe.store))
    queries = Queries.of(dataset.bundles, parts.test)
    live = bank.get(record.reference)
    head = live.head_as(BundleHead)
    cache = VectorCache(folder / "vectors")
    own = append_pictures(cache.vectors(bank, dataset.texts, record.reference), dataset, live, cache)
    result = {
        "users": queries.groups.tolist(),
        "before": rank_before(dataset, bank, recipe, queries, cache).tolist(),
        "after": rank_targets(head, own, queries).tolist(),
        "chosen": record.manifest.metrics,
    }
    write_text(kept, json.dumps(result) + "\n")
    return result


def rank_before(
    dataset: Dataset, bank: AdapterBank, recipe: Recipe, queries: Queries, cache: VectorCache
) -> NDArray[np.float64]:
    """Rank by the frozen encoders under an untrained head: the cosine of half-whitened parts, equally weighed."""
    assert isinstance(recipe.task, BundleTask)
    vectors = cache.vectors(bank, dataset.texts, None)
    looks = encode_looks(dataset, bank, cache)
    if looks is None:
        head = BundleHead(bank.backbone.dim, recipe.task)
    else:
        head = BundleHead(bank.backbone.dim, recipe.task, PictureView(WIDTH, None))
        vectors = np.hstack([vectors, looks])
    head.measure(vectors)
    return rank_targets(head.eval(), vectors, queries)


def tabulate(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Return a table in Markdown: means with intervals, and each against text alone."""
    lines = [
        "| reads | | NDCG@10 | 95 % interval | R@10 | 95 % interval | p against text |",
        "|---|---|---|---|---|---|---|",
    ]
    seeds = sorted({seed for _, seed in found})
    users = np.array([user for seed in seeds for user in found["text", seed]["users"]])

    def pool(name: str, when: str, metric: str) -> NDArray[np.float64]:
        ranks = [np.array(found[name, seed][when]) for seed in seeds]
        return metrics.per_query(np.concatenate(ranks), metric)

    for name in CASES:
        for when, what in (("before", "frozen"), ("after", "tuned")):
            cells = []
            for metric in METRICS:
                values = pool(name, when, metric)
                low, high = metrics.bootstrap_interval(values, users)
                cells += [f"{values.mean():.3f}", f"{low:.3f} to {high:.3f}"]
            own, text = (pool(one, when, "ndcg@10") for one in (name, "text"))
            p = "" if name == "text" else f"{metrics.paired_permutation(text, own, users):.4f}"
            lines.append(f"| {name} | {what} | {' | '.join(cells)} | {p} |")
    count = f"{len(users):,} questions of {len(set(users.tolist())):,} users, splits {', '.join(map(str, seeds))}"
    return "\n".join([count, "", *lines])


if __name__ == "__main__":
    main()
