"""sentence-transformers beside us: the whole encoder tuned by its own trainer and loss, on the same bundles and texts.

    PEFT_COMBO_DATA=PATH python benchmarks/peers_sentence_transformers.py clothing
    PEFT_COMBO_DATA=PATH python benchmarks/peers_sentence_transformers.py clothing electronic --part test --seed 95

Its way with sets is pairs: two items of one training bundle are a positive, the rest of the batch negatives
(MultipleNegativesRankingLoss, every pair once an epoch). A context is the mean of its items' vectors. The epoch and the
learning rate are chosen on validation by NDCG@10, as our step is. `--part valid`, the default, prints validation, on
which both were chosen, and looks at no test bundle. R@10 and NDCG@10 with ties at mid-rank among the whole catalogue,
95 % intervals by bootstrap over users, p of paired permutations of users against our adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _cases import parse_cases
from _peer import load_sentence_transformer
from _smoke import make_tiny
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.completion import rank_targets
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.scoring.text import TextCosine
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

RECIPES = {"clothing": "lora-fashion", "electronic": "lora-electronics"}
RATES, EPOCHS, BATCH = (2e-5, 1e-4), 4, 64
MISSING = "sentence-transformers is not installed: its row is left out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("valid", "test"), default="valid", help="whose questions are measured")
    parser.add_argument("--seed", type=int, default=60, help="of the user split")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of sentence-transformers, at most")
    options = parse_cases(parser, RECIPES)
    if options.smoke:
        with make_tiny() as tiny:
            measure(load_recipe("lora-fashion", tiny.changes, data=tiny.shop), "valid", tiny.folder, 1, RATES[:1])
        return
    for name in options.cases or RECIPES:
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            changes = ("data.split=user", f"data.split_seed={options.seed}", f"store={scratch}/adapters")
            recipe = load_recipe(RECIPES[name], changes, data=Path(options.data_root) / "bundlerec" / name)
            print(f"{name}, user split {options.seed}, {options.part} users")
            measure(recipe, options.part, Path(scratch), options.epochs, RATES)


def measure(recipe: Recipe, part: str, scratch: Path, epochs: int, rates: Sequence[float]) -> None:
    """Tune both, print a row for each."""
    dataset = open_dataset(recipe.data)
    parts = split_as(dataset, recipe.data)
    queries = {name: Queries.of(dataset.bundles, getattr(parts, name)) for name in ("valid", part)}
    backbone = Backbone.load(recipe.backbone.model, max_length=recipe.backbone.max_length)
    history = dataset.bundles.to_csr(len(dataset.catalog), parts.train)

    def rank(vectors: NDArray[np.float32], asked: Queries) -> NDArray[np.float64]:
        scorer = TextCosine().fit(history, items=vectors)
        blocks = [asked.take(slice(start, start + 256)) for start in range(0, len(asked), 256)]
        scores = np.concatenate([scorer.score_baskets(one.to_csr(len(dataset.catalog))) for one in blocks])
        return metrics.midranks(scores, asked.targets, asked.excluded())

    ranks = {"frozen": (rank(backbone.encode(dataset.texts), queries[part]), "")}
    tuned = tune(recipe, run_folder=scratch / "run").record
    live = AdapterBank(backbone, AdapterStore(recipe.store)).get(tuned.reference)
    ours = f"{recipe.adapter.method}, ours"
    own = backbone.encode(dataset.texts, live.attached)
    ranks[ours] = (rank_targets(live.head, own, queries[part]), "")
    if importlib.util.find_spec("sentence_transformers") is None:
        print(MISSING)
    else:
        bundles = [dataset.bundles.items[row] for row in parts.train]
        found: dict[str, tuple[float, NDArray[np.float64]]] = {}

        def keep(vectors: NDArray[np.float32], setting: str) -> None:
            chosen = float(metrics.per_query(rank(vectors, queries["valid"]), "ndcg@10").mean())
            found[setting] = (chosen, rank(vectors, queries[part]))
            print(f"  {setting}: NDCG@10 {chosen:.4f} on validation", file=sys.stderr, flush=True)

        for rate in rates:
            tune_pairs(backbone, dataset.texts, bundles, rate, epochs, scratch / f"pairs-{rate:g}", keep)
        setting = max(found, key=lambda name: found[name][0])
        ranks["sentence-transformers, all weights"] = (found[setting][1], setting)
    print_rows(ranks, ours, queries[part].groups)


def tune_pairs(
    backbone: Backbone, texts: list[str], bundles: Sequence[NDArray[Any]], rate: float, epochs: int, folder: Path,
    keep: Callable[[NDArray[np.float32], str], None],
) -> None:  # fmt: skip
    """Tune a copy of the encoder by sentence-transformers; hand the catalogue's vectors to `keep` after each epoch."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    model = load_sentence_transformer(backbone, folder / "base")
    pairs = [pair for bundle in bundles for pair in itertools.combinations(bundle.tolist(), 2)]
    data = Dataset.from_dict({"anchor": [texts[a] for a, _ in pairs], "positive": [texts[b] for _, b in pairs]})

    class AfterEpoch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
            keep(np.asarray(vectors, np.float32), f"rate {rate:g}, epoch {round(state.epoch)}")

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=rate,
        warmup_steps=0.1, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model),
        callbacks=[AfterEpoch()],
    )  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()


def print_rows(ranks: dict[str, tuple[NDArray[np.float64], str]], ours: str, groups: NDArray[np.str_]) -> None:
    """Print a line for each row of ranks (Q,)."""
    beside = metrics.per_query(ranks[ours][0], "ndcg@10")
    print(f"{len(groups):,} questions of {len(np.unique(groups)):,} users")
    print(f"{'':36}{'R@10':>8}{'NDCG@10':>9}  95 % interval   p     setting")
    for name, (own, setting) in ranks.items():
        ndcg = metrics.per_query(own, "ndcg@10")
        low, high = metrics.bootstrap_interval(ndcg, groups)
        p = "" if name == ours else f"{metrics.paired_permutation(ndcg, beside, groups):.4f}"
        recall = metrics.per_query(own, "r@10").mean()
        print(f"{name:36}{recall:8.3f}{ndcg.mean():9.4f}  {low:.3f} to {high:.3f}  {p:6}  {setting}", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
