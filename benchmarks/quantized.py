"""Frozen weights in float32, bfloat16, 8 and 4 bits side by side: speed, memory, and what it does to vectors and NDCG.

    python benchmarks/quantized.py                       # the embedded encoder over the demo catalogue, a few minutes
    python benchmarks/quantized.py --data FOLDER --model FOLDER --epochs 3

A LoRA is tuned once over float32 weights. Each form then encodes the catalogue in a process of its own, without and
with that adapter, several rounds in turn, so that a drift of the machine hits all alike. Weights are the bytes that the
frozen tensors take (bfloat16 here is autocast, as in training, so they stay float32); peak is the high-water mark of
the process. Drift is the largest difference of a coordinate of a unit vector to float32; NDCG@10 that of the recipe's
validation questions, its change to float32 paired by group. The row "tuned" is what the warning on an adapter of
another quantisation speaks of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _smoke import add_smoke, make_tiny

FORMS = {"float32": ("none", "no"), "bfloat16": ("none", "bf16"), "8bit": ("8bit", "no"), "4bit": ("4bit", "no")}

ENCODE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from peft_combo.recipe.parse import parse_recipe
from peft_combo.recommender import Workspace
from peft_combo.tuning.resources import peak_mib
from peft_combo.tuning.plan import build_autocast
raw, bits, precision, adapter, vectors = sys.argv[1:]
recipe = parse_recipe(json.loads(raw))
encoder = recipe.backbone.model_copy(update={"quantization": bits})
space = Workspace.of(recipe.model_copy(update={"backbone": encoder}))
texts, backbone = list(dict.fromkeys(space.dataset.texts)), space.backbone
attached = backbone.attach(space.store.open(recipe.category)) if adapter == "tuned" else None
with build_autocast("cpu", precision):
    backbone.encode(texts[:64], attached)
    clock = time.perf_counter()
    encoded = backbone.encode(texts, attached)
    seconds = time.perf_counter() - clock
np.save(vectors, encoded)
held = {}
for module in backbone.model.modules():
    weight = getattr(module, "weight", None)
    extra = [getattr(weight, "SCB", None), getattr(getattr(weight, "quant_state", None), "absmax", None)]
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *extra):
        if tensor is not None:
            held[id(tensor)] = tensor.numel() * tensor.element_size()
print(json.dumps({"rate": len(texts) / seconds, "weights": sum(held.values()) / 2**20, "peak": peak_mib()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of a dataset; default: the built-in demo")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        with make_tiny() as tiny:
            compare(tiny.changes, str(tiny.shop), {form: FORMS[form] for form in ("float32", "8bit")}, ("tuned",), 1)
        return
    size = (f"training.epochs={options.epochs}", f"backbone.model={options.model}")
    compare(size, options.data, FORMS, ("frozen", "tuned"), options.rounds)


def compare(
    size: tuple[str, ...], data: str | None, forms: Mapping[str, tuple[str, str]], sides: Sequence[str], rounds: int
) -> None:
    """Tune once over float32, and print a table for each side: without the adapter, with it."""
    import numpy as np
    from safetensors.torch import load_file

    from peft_combo import metrics
    from peft_combo.adapters.validation import ValidationQueries
    from peft_combo.encoder.heads.base import HEAD_FILE
    from peft_combo.encoder.heads.completion import BundleHead
    from peft_combo.recipe.adapter import LoraAdapter
    from peft_combo.recipe.files import load_recipe
    from peft_combo.recipe.task import BundleTask
    from peft_combo.tuning.loop import tune

    with tempfile.TemporaryDirectory(prefix="quantized-") as folder:
        recipe = load_recipe("lora-fashion", (*size, f"store={folder}/adapters"), data)
        recipe = recipe.model_copy(update={"adapter": LoraAdapter()})  # in all layers, where rounding can be answered
        record = tune(recipe, run_folder=Path(folder) / "run").record
        validation = ValidationQueries.of(recipe)
        row_of = {text: row for row, text in enumerate(dict.fromkeys(validation.texts))}
        rows = [row_of[text] for text in validation.texts]
        raw = json.dumps(recipe.model_dump(mode="json"))
        for adapter in sides:
            found: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
            for _ in range(rounds):
                for form, (bits, precision) in forms.items():
                    found[form].append(child(raw, bits, precision, adapter, f"{folder}/{form}.npy"))
            if adapter == "tuned":
                head = BundleHead.from_spec(record.manifest.task, load_file(record.file(HEAD_FILE)))
            else:
                head = BundleHead(record.manifest.backbone.dim, BundleTask()).eval()
            header = f"{'texts/s':>9}{'weights':>11}{'peak':>11}{'drift':>10}{'cosine':>9}{'NDCG@10':>9}  change"
            print(f"\n{adapter:10}{header}")
            exact = np.load(f"{folder}/float32.npy")
            before = validation.ranks(head, exact[rows])
            for form in forms:
                vectors = np.load(f"{folder}/{form}.npy")
                ranks = validation.ranks(head, vectors[rows])
                gain = validation.gain(before, ranks)
                drift, cosine = float(np.abs(vectors - exact).max()), float((vectors * exact).sum(1).min())
                rate = statistics.median(one["rate"] for one in found[form])
                ndcg = metrics.ranking_metrics(ranks)["ndcg@10"]
                took = found[form][0]
                print(
                    f"{form:10}{rate:9.1f}{took['weights']:7.1f} MiB{took['peak']:7.0f} MiB{drift:10.1e}{cosine:9.5f}"
                    f"{ndcg:9.4f}  {gain.value:+.4f} [{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}]",
                    flush=True,
                )


def child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", ENCODE, *arguments], cwd=Path(__file__).resolve().parent.parent, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
