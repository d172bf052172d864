"""Write a dataset and a split as the files that CLHE reads, so that it can be run on the very questions of `evaluate`.

    python benchmarks/export_clhe.py --recipe lora-fashion --data PATH/bundlerec/clothing --to CLHE/datasets/clothing

CLHE is Ma et al. 2024, "Leveraging multimodal features and item-level user feedback for bundle construction" (WSDM);
its `utility.py` reads from a folder below `datasets/`:

    count.json                 {"#U": users, "#B": bundles, "#I": items}
    bi_train.npy               (n, 2) bundle, item of the training bundles
    bi_valid_input.npy, _gt    the same of held-out ones: what is given, and what is asked for; and of test
    ui_full.npy                (n, 2) user, item
    content_feature.pt, description_feature.pt, item_cf_feature.pt   (N, D) tensors; the last has 64 columns

Each leave-one-out question is a bundle of its own there, so that its recall@k is ours. Users' items are those that
train may see, never a held-out user's. There are no pictures here: content is the frozen encoder's vector of the title,
description that of title and category where there is one. Its authors' item_cf_feature comes from LightGCN; here it is
a truncated SVD of users by items, 64 columns, zero for an item nobody took. `ids.json` says what rows are. The .pt
files hold plain tensors (`torch.load(..., weights_only=True)` opens them), everything else opens without unpickling.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split
from peft_combo.files import stage_folder
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.fit_data import FitData

# The width that CLHE's layers after item_cf_feature are built for.
FACTORS = 64
STANZA = """{name}:
  data_path: './datasets/'
  batch_size_train: 256
  batch_size_test: 1024
  topk: [1, 5, 10, 20]
  neg_num: 1
  embedding_sizes: [64]
  num_layerss: [1]
  lrs: [1.0e-3]
  l2_regs: [1.0e-5]
  epochs: 50
  test_interval: 2
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lora-fashion", help="whose data, split and frozen encoder are taken")
    parser.add_argument("--data", type=Path, help="folder of the data, in place of the recipe's")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--to", type=Path, help="folder to write; it must not be there yet")
    parser.add_argument("--cache", type=Path, default=Path("vectors"), help="folder of item vectors")
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        with make_tiny() as tiny:
            space = Workspace.of(
                load_recipe("lora-fashion", tiny.changes, data=tiny.shop), cache=tiny.folder / "vectors"
            )
            export(space, tiny.folder / "clhe")
            check(space, tiny.folder / "clhe")
        return
    if options.to is None:
        parser.error("name the folder to write by --to")
    if options.to.exists():
        parser.error(f"{options.to} is there already; name another folder")
    export(
        Workspace.of(load_recipe(options.recipe, options.changes, data=options.data), cache=options.cache), options.to
    )


def export(space: Workspace, folder: Path) -> None:
    """Write everything and print what there is."""
    dataset, parts = space.dataset, space.split
    arrays, bundle_ids = collect_pairs(dataset, parts)
    titles = space.encode_catalog()
    described = space.encode_described(titles)
    known = FitData.of(dataset, parts.train, parts.train_interactions, None, {})
    users = len(dataset.interactions.user_ids) if dataset.interactions is not None else 0
    counts = {"#U": max(1, users), "#B": len(bundle_ids), "#I": len(dataset.catalog)}
    features = {
        "content_feature": titles,
        "description_feature": titles if described is None else described,
        "item_cf_feature": factorise(known.taken),
    }
    with stage_folder(folder) as staged:
        for name, pairs in arrays.items():
            np.save(staged.path / f"{name}.npy", pairs, allow_pickle=False)
        for name, values in features.items():
            torch.save(torch.from_numpy(np.array(values, np.float32)), staged.path / f"{name}.pt")
        ids = {"items": dataset.catalog.item_ids, "bundles": bundle_ids, "split": parts.digest, "data": dataset.digest}
        (staged.path / "ids.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.manifest = ("count.json", json.dumps(counts).encode() + b"\n")
    print(f"{dataset.name}, split {parts.digest[:12]}: {counts['#B']:,} bundles and questions, {counts['#I']:,} items")
    print("\n".join(f"  {name}: {len(pairs):,} pairs" for name, pairs in arrays.items()))
    print(f"Add to CLHE's config.yaml, and run train.py --dataset {folder.name} --model CLHE:\n")
    print(STANZA.format(name=folder.name), end="")


def collect_pairs(dataset: Dataset, parts: Split) -> tuple[dict[str, NDArray[np.int32]], list[str]]:
    """Return the arrays by their file's name, and what each of CLHE's bundles is: a training bundle, or a question."""
    bundles = dataset.bundles
    items = dataset.catalog.item_ids
    train = [(place, row) for place, bundle in enumerate(parts.train) for row in bundles.items[bundle].tolist()]
    arrays = {"bi_train": train}
    names = [bundles.bundle_ids[row] for row in parts.train]
    for part, rows in (("valid", parts.valid), ("test", parts.test)):
        queries = Queries.of(bundles, rows)
        given, asked = [], []
        for context, target, bundle in zip(queries.contexts, queries.targets.tolist(), queries.bundles, strict=True):
            given += [(len(names), row) for row in context[context >= 0].tolist()]
            asked.append((len(names), target))
            names.append(f"{bundles.bundle_ids[rows[bundle]]} without {items[target]}")
        arrays |= {f"bi_{part}_input": given, f"bi_{part}_gt": asked}
    taken = [] if dataset.interactions is None else _list_taken(dataset, parts)
    arrays["ui_full"] = taken
    return {name: np.array(pairs, np.int32).reshape(-1, 2) for name, pairs in arrays.items()}, names


def _list_taken(dataset: Dataset, parts: Split) -> list[tuple[int, int]]:
    assert dataset.interactions is not None
    seen = dataset.interactions.take(parts.train_interactions)
    known = seen.users >= 0
    return sorted(set(zip(seen.users[known].tolist(), seen.items[known].tolist(), strict=True)))


def factorise(taken: sparse.csr_array[Any, tuple[int, int]]) -> NDArray[np.float32]:
    """Return (N, 64) item factors of users by items, columns without a factor 0."""
    from scipy.sparse.linalg import svds

    found = np.zeros((taken.shape[1], FACTORS), np.float32)
    rank = min(FACTORS, min(taken.shape) - 1)
    if rank > 0 and taken.nnz:
        _, strength, right = svds(taken.astype(np.float64), k=rank, random_state=0)
        found[:, :rank] = (right * np.sqrt(np.maximum(strength, 0))[:, None]).T
    return found


def check(space: Workspace, folder: Path) -> None:
    """Read the files back and hold them against the split; of tensors the bytes, which takes no unpickling."""
    dataset, parts = space.dataset, space.split
    counts = json.loads((folder / "count.json").read_text())
    read = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
    shape = (counts["#B"], counts["#I"])
    graphs = {name: sparse.coo_array((np.ones(len(p)), (p[:, 0], p[:, 1])), shape).tocsr() for name, p in read.items()
              if name != "ui_full"}  # fmt: skip
    for place, row in enumerate(parts.train):
        assert sorted(graphs["bi_train"][[place]].indices.tolist()) == sorted(dataset.bundles.items[row].tolist())
    for part, rows in (("valid", parts.valid), ("test", parts.test)):
        whole = graphs[f"bi_{part}_input"] + graphs[f"bi_{part}_gt"]
        asked = np.flatnonzero(np.diff(graphs[f"bi_{part}_gt"].indptr))
        sets = [frozenset(whole[[row]].indices.tolist()) for row in asked.tolist()]
        assert len(sets) == sum(len(dataset.bundles.items[row]) for row in rows)
        assert set(sets) == {frozenset(dataset.bundles.items[row].tolist()) for row in rows}
        assert not np.diff(graphs["bi_train"].indptr)[asked].any()
    for name in ("content_feature", "description_feature", "item_cf_feature"):
        with zipfile.ZipFile(folder / f"{name}.pt") as archive:
            (data,) = (one for one in archive.namelist() if one.endswith("/data/0"))
            values = np.frombuffer(archive.read(data), "<f4").reshape(counts["#I"], -1)
        assert np.isfinite(values).all()
        if name == "content_feature":
            np.testing.assert_array_equal(values, space.encode_catalog())
        if name == "item_cf_feature":
            assert values.shape[1] == FACTORS
    print("read back: every training bundle and every question is as the split has it")


if __name__ == "__main__":
    main()
