"""Scores of RecTools models for questions of bundles: run by `peers_rectools.py` in an environment with RecTools alone.

    python _rectools_worker.py QUESTIONS.npz SCORES.npz

A training bundle is a user to RecTools. Models are fitted on these; a question is a user whose interactions are its
context, in a data set of its own, so that no context is learned from.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import EASEModel, ImplicitItemKNNWrapperModel, PopularModel

NEIGHBOURS, REGULARIZATIONS = (20, 100), (10.0, 100.0, 500.0)
# Items that are kept of each question's list; what is farther counts as not known.
LIST = 200


def build_models() -> list[tuple[str, str, Any]]:
    """Return (row, setting, model), every setting that validation may choose."""
    kinds = (("TFIDF", TFIDFRecommender), ("BM25", BM25Recommender), ("cosine", CosineRecommender))
    found: list[tuple[str, str, Any]] = [
        (f"RecTools ItemKNN {name}", f"K {k}", ImplicitItemKNNWrapperModel(kind(K=k, num_threads=1)))
        for name, kind in kinds
        for k in NEIGHBOURS
    ]
    found += [("RecTools EASE", f"regularization {value:g}", EASEModel(value)) for value in REGULARIZATIONS]
    return [*found, ("RecTools PopularModel", "n_users", PopularModel())]


def make_dataset(indptr: Any, indices: Any, items: int, extra: bool) -> Dataset:
    """Make a data set of rows of items, and of one more that has the item of the highest number."""
    if extra:
        indptr, indices = np.append(indptr, indptr[-1] + 1), np.append(indices, items - 1)
    rows = len(indptr) - 1
    table = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(rows), np.diff(indptr)), "item_id": indices, "weight": 1.0,
            "datetime": pd.Timestamp("2020-01-01"),
        }
    )  # fmt: skip
    return Dataset(IdMap.from_values(np.arange(rows)), IdMap.from_values(np.arange(items)), Interactions(table))


def main() -> None:
    source, target = sys.argv[1:]
    warnings.simplefilter("ignore")
    with np.load(source, allow_pickle=False) as read:
        told = {name: read[name] for name in read.files}
    items = int(told["items"])
    # RecTools takes the width of its matrices from the highest item that is there: a training item gets the highest
    # number, and beside the questions stands a row that nobody asks for.
    new = np.arange(items)
    kept = told["train_indices"].max()
    new[[kept, items - 1]] = new[[items - 1, kept]]
    train = make_dataset(told["train_indptr"], new[told["train_indices"]], items, extra=False)
    written: dict[str, Any] = {}
    models = build_models()
    for place, (_, _, model) in enumerate(models):
        model.fit(train)
        for part in ("valid", "test"):
            asked = make_dataset(told[f"{part}_indptr"], new[told[f"{part}_indices"]], items, extra=True)
            users = np.arange(len(told[f"{part}_indptr"]) - 1)
            found = model.recommend(users, asked, k=min(LIST, items), filter_viewed=True)
            written[f"{part}_{place}_question"] = found["user_id"].to_numpy(np.int64)
            written[f"{part}_{place}_item"] = new[found["item_id"].to_numpy(np.int64)]  # its own inverse
            written[f"{part}_{place}_score"] = found["score"].to_numpy(np.float64)
    written["names"] = np.array([name for name, _, _ in models])
    written["settings"] = np.array([setting for _, setting, _ in models])
    np.savez_compressed(target, **written)


if __name__ == "__main__":
    main()
