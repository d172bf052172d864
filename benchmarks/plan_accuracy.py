"""How near the plan comes to the run: estimated and measured peak memory and time, case by case.

    python benchmarks/plan_accuracy.py                    # the embedded encoder over the demo catalogue, some minutes
    python benchmarks/plan_accuracy.py --data FOLDER --bundles 400 --case lora-all

Each plan and each run has a process of its own, so that neither finds memory the other has touched; the measured peak
is that process's high-water mark of resident memory, and the time that of the whole run, loading
included. The ratio is estimate over measurement; memory is asked to be within 15 %. What takes memory happens in every
epoch, so one epoch over some of the bundles shows the peak of many. bf16 on a CPU is shown but not judged: it keeps
kernels for every shape of batch, as the plan says, so its peak grows with the steps.

Where there is a GPU all runs there, and the memory is the GPU's, as its allocator counts it; `--cpu` hides it. The last
column of figures is the validation metric after the epoch, so that precisions can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _smoke import add_smoke, make_tiny

# Overrides of lora-fashion; a mapping stands for its whole adapter section.
CASES: dict[str, tuple[str | dict[str, Any], ...]] = {
    "lora-top1": (),
    "lora-all": ("adapter.top_layers=null",),
    "lora-all-batch128": ("adapter.top_layers=null", "training.batch_size=128"),
    "lora-all-accumulated": ("adapter.top_layers=null", "training.batch_size=128", "training.accumulation=4"),
    "lora-all-plain-path": ("adapter.top_layers=null", "training.fast_path=false"),
    "lora-all-bf16": ("adapter.top_layers=null", "backbone.precision=bf16"),
    "lora-all-fp16": ("adapter.top_layers=null", "backbone.precision=fp16"),
    "lora-all-8bit": ("adapter.top_layers=null", "backbone.quantization=8bit"),
    "lora-all-4bit": ("adapter.top_layers=null", "backbone.quantization=4bit"),
    "adalora-all": ({"method": "adalora"},),
    "prefix": ({"method": "prefix"},),
    "bottleneck": ({"method": "bottleneck"},),
    "head": ({"method": "head"},),
    "top-layers-2": ({"method": "top-layers", "layers": 2},),
    "full": ({"method": "full"},),
}
ALLOWED = 0.15

PLAN = """
import dataclasses, json, sys
from peft_combo.recipe.parse import parse_recipe
from peft_combo.tuning.plan import plan
found = plan(parse_recipe(json.loads(sys.argv[1])))
mib = found.memory.device or found.memory.host
print(json.dumps({"mib": mib, "seconds": found.seconds, "parts": dataclasses.asdict(found.memory)}))
"""
RUN = """
import json, sys
from pathlib import Path
from peft_combo.recipe.parse import parse_recipe
from peft_combo.tuning.loop import tune
done = tune(parse_recipe(json.loads(sys.argv[1])), run_folder=Path(sys.argv[2]))
metric = done.table.rows[-1].values[done.plan.metric]
print(json.dumps({"mib": done.peak_mib, "seconds": done.seconds, "metric": metric}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of a dataset; default: the built-in demo")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--bundles", type=int, default=1000, help="how many of the bundles; the catalogue stays whole")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case; may be repeated; default all")
    add_smoke(parser)
    options = parser.parse_args()
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.smoke:
        with make_tiny() as tiny:
            compare(("lora-top1",), tiny.changes, str(tiny.shop))  # so small a run is all overhead: nothing to judge
        return 0
    size = ("training.epochs=1", f"data.max_bundles={options.bundles}", f"backbone.model={options.model}")
    worst = compare(options.case or tuple(CASES), size, options.data)
    print(f"\nfurthest off: {worst:.0%} of the measured peak; allowed {ALLOWED:.0%}")
    return int(worst > ALLOWED)


def compare(cases: Sequence[str], size: tuple[str, ...], data: str | None) -> float:
    """Print one line a case, and return how far the worst plan is off, as a share of the measured peak."""
    from peft_combo.recipe.files import load_recipe

    heads = f"{'est. s':>9}{'meas. s':>9}{'ratio':>7}{'metric':>8}   parts, MiB"
    print(f"{'':22}{'estimate':>10}{'measured':>10}{'ratio':>7}{heads}")
    worst = 0.0
    for name in cases:
        overrides = (*size, *(key for key in CASES[name] if isinstance(key, str)))
        with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as folder:
            recipe = load_recipe("lora-fashion", (*overrides, f"store={folder}/adapters"), data)
            values = recipe.model_dump(mode="json")
            for adapter in (section for section in CASES[name] if not isinstance(section, str)):
                values["adapter"] = adapter
            raw = json.dumps(values)
            planned, ran = child(PLAN, raw), child(RUN, raw, f"{folder}/run")
        ratio = planned["mib"] / ran["mib"]
        if "bf16" not in name:
            worst = max(worst, abs(ratio - 1))
        parts = " ".join(f"{part} {size:.0f}" for part, size in planned["parts"].items() if size and part != "gpu")
        print(
            f"{name:22}{planned['mib']:10,.0f}{ran['mib']:10,.0f}{ratio:7.2f}{planned['seconds']:9.0f}"
            f"{ran['seconds']:9.0f}{planned['seconds'] / ran['seconds']:7.2f}{ran['metric']:8.4f}   {parts}",
            flush=True,
        )
    return worst


def child(program: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
