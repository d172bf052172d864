"""Compares the methods on BundleRec clothing and writes what it finds into docs/.

    python benchmarks/compare_methods.py --data-root FOLDER [--seeds 0,1,2] [--set training.epochs=12]

FOLDER (or the variable PEFT_COMBO_DATA) holds ``bundlerec/clothing``. Writes docs/comparison.md, and on the page of
each method the paragraph behind its mark. What was stopped goes on where it was; runs and adapters are in ``--folder``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path

from _smoke import add_smoke, make_tiny

from peft_combo.cli.output import ConsoleWatch, format_metric_name
from peft_combo.evaluation.comparison.runs import compare
from peft_combo.evaluation.comparison.table import PROTOCOL, SIGNIFICANT, Comparison, Line
from peft_combo.evaluation.comparison.variants import variants_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPE, DATA, SPLIT = "lora-fashion", "bundlerec/clothing", "data.split=user"
# Titles alone, from plain cosine, as the table was measured; the recipe has come to read more since.
PLAIN = ("data.text={title}", "task.whitening=none")
METHODS = ("lora", "adalora", "prefix", "ia3", "bottleneck", "full")
MARK = "<!-- measured -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("PEFT_COMBO_DATA"))
    parser.add_argument("--method", action="append", default=[], dest="methods", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        with make_tiny() as tiny:
            variants = variants_of(RECIPE, methods=("lora", "head"), overrides=tiny.changes, data=str(tiny.shop))
            print(page(compare(variants, [0], tiny.folder / "runs", ConsoleWatch()), "--smoke"))
        return
    if options.data_root is None:
        parser.error("name the folder of the data by --data-root or PEFT_COMBO_DATA")

    methods, seeds = options.methods or list(METHODS), [int(word) for word in options.seeds.split(",")]
    changes = [SPLIT, *PLAIN, *options.changes]
    variants = variants_of(RECIPE, methods=methods, overrides=changes, data=str(Path(options.data_root) / DATA))
    found = compare(variants, seeds, options.folder, ConsoleWatch())
    words = [
        *(word for method in methods for word in ("--method", method)), "--seeds", options.seeds,
        *(word for change in changes for word in ("--set", change)),
    ]  # fmt: skip
    (DOCS / "comparison.md").write_text(page(found, shlex.join(words)), encoding="utf-8")
    for line in found.lines:
        file = DOCS / "methods" / f"{line.label}.md"
        text = file.read_text(encoding="utf-8")
        # A function, so that no backslash in the paragraph is taken for a group.
        marked = re.sub(rf"{MARK}.*?(?=\n\n|\Z)", lambda _, own=line: paragraph(own, found), text, flags=re.DOTALL)
        file.write_text(marked, encoding="utf-8")


def page(found: Comparison, words: str) -> str:
    """Return docs/comparison.md."""
    epochs = found.recipes[found.best.label].training.epochs
    seeds = f"seed{'s' if len(found.seeds) > 1 else ''} {', '.join(map(str, found.seeds))}"
    rows = [
        "| method | NDCG@10 | 95 % interval | spread | over frozen | p: best | parameters | stored MiB | minutes "
        "| peak MiB | 1 text, ms | 32 texts, ms | load, ms |",
        "|---" * 13 + "|",
        *(row(line) for line in found.lines),
    ]
    failed = "".join(f"\n{one.label} failed: {one.reason}\n" for one in found.failed)
    cheapest = ""
    if found.cheapest is not None and found.cheapest != found.best.label:
        cheapest = f" The cheapest that is not significantly worse (p > {SIGNIFICANT}): {found.cheapest}."
    return f"""# Methods compared

Written by `python benchmarks/compare_methods.py`. BundleRec clothing by `{RECIPE}`: {found.asked}.
At most {epochs} epochs, {seeds}. Each method has its own defaults and learning rate; the layers and modules it may
adapt, data, batches and budget are the same, as far as the method has such a choice.

```bash title="Not run in CI: BundleRec, and half an hour"
peft-combo compare --recipe {RECIPE} --data bundlerec/clothing \\
  {words}
```

{chr(10).join(rows)}
{failed}
Best: {found.best.label}.{cheapest} Parameters: the adapter's; the head's {found.best.head_parameters:,} come on top.

{PROTOCOL}
Milliseconds are medians, in brackets how many times the frozen encoder's, measured in turn with it. Times on
{found.machine}, which had other work to do.
"""


def row(line: Line) -> str:
    """Return one row of the table."""
    _, *figures = line.cells()
    cells = (f"[{line.label}](methods/{line.label}.md)", *figures)
    return f"| {' | '.join(cells)} |"


def paragraph(line: Line, found: Comparison) -> str:
    """Return what stands on a method's page behind the mark."""
    gain = line.gain
    over = "" if gain is None else f", {gain.value:+.4f} [{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}] over frozen"
    epochs = found.recipes[line.label].training.epochs
    return (
        f"{MARK}\nMeasured on BundleRec clothing by `{RECIPE}`, at most {epochs} epochs, on validation:\n"
        f"{format_metric_name(found.metric)} {line.value:.4f}{over}, with {line.adapter_parameters:,} parameters.\n"
        "See [the comparison](../comparison.md) for the others and what they cost."
    )


if __name__ == "__main__":
    main()
