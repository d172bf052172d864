"""`evaluate` command: every scorer on the test bundles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import (
    CacheOption,
    DataOption,
    JsonOption,
    RecipeOption,
    RecipeStoreOption,
    SetOption,
    app,
    load_ready_recipe,
    open_workspace,
)
from peft_combo.cli.chart_files import PLOT_HELP, write_chart
from peft_combo.cli.complete import complete_adapter
from peft_combo.cli.output import ConsoleWatch, console_watch, format_metric_name, print_json, print_line, print_table
from peft_combo.errors import DataError, PeftComboError

_SLICES = ("warm target", "cold target", "same-leaf", "cross-leaf", "cross-category", "cold among cold",
           "among distractors")  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from peft_combo.evaluation.composition import CompositionReport
    from peft_combo.evaluation.detection import DetectionReport
    from peft_combo.evaluation.off_policy import OffPolicyReport
    from peft_combo.evaluation.report import Report
    from peft_combo.evaluation.text_queries import QueryReport
    from peft_combo.recipe.model import Recipe
    from peft_combo.recommender.workspace import Workspace


@app.command(short_help="Measure adapters on test bundles, beside every baseline.")
def evaluate(
    recipe: RecipeOption,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            autocompletion=complete_adapter,
            help="Adapter to measure, as in fashion or fashion@v2; may be repeated.",
        ),
    ] = None,
    compose: Annotated[
        bool,
        typer.Option("--compose", help="Composition of whole test bundles from one item too: composer, beam, top-k."),
    ] = False,
    queries: Annotated[
        bool,
        typer.Option("--queries", help="Text queries in place of completion: test bundles found by their intents."),
    ] = False,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Detection of the bundles in test users' sessions too.")
    ] = False,
    log: Annotated[
        str | None,
        typer.Option("--log", help="Logged lists (a file, or the state of a service) to judge --adapter by instead."),
    ] = None,
    explore: Annotated[
        str,
        typer.Option("--explore", help="With --log: how the candidate draws lists, as in plackett-luce:0.5."),
    ] = "plackett-luce:0.5",
    plot_file: Annotated[Path | None, typer.Option("--plot", help=PLOT_HELP)] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    cache: CacheOption = Path("vectors"),
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Slices, chosen settings and the protocol as well.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure completion of the test bundles, every baseline beside it: fitted on train, chosen on validation.

    With --queries, how well they are found by their intents: the intent (or name) column of bundle_meta. With --log,
    what the candidate would have earned on the lists that a service showed; no test bundle is looked at.
    """
    from peft_combo.metrics.charts import check_ending

    if log is not None and (queries or compose or sessions or plot_file is not None):
        raise DataError("--log prints a table of its own, without --queries, --compose, --sessions and --plot.")
    if queries and (compose or sessions or plot_file is not None):
        raise DataError(
            "--queries prints a table of its own, without --compose, --sessions and --plot. Run it by itself."
        )
    if plot_file is not None:
        check_ending(plot_file)
    loaded = load_ready_recipe(recipe, overrides, data, store)
    with console_watch() as callback:
        references = adapters or []
        space = open_workspace(
            loaded, recipe, overrides, data, store, references, cache=cache, on_note=callback.on_note
        )

        if log is not None:
            judged = _judge_by_log(space, references, log, explore, callback)
            (print_json(judged.to_json()) if as_json else _print_judged(judged))
            return
        if sessions:
            from peft_combo.evaluation.detection import check_sessions

            check_sessions(space.dataset)
        dataset = space.dataset
        _refuse_leaks(space, references, callback)
        told = {f"{dataset.name}: {note}" for note in dataset.notes}
        if queries:
            found = _search_by_intents(space, references, callback)
            (print_json(found.to_json()) if as_json else _print_queries(found, told))
            return
        report = _measure_completion(space, references, compose, sessions, callback)
    (print_json(report.to_json()) if as_json else _print_report(report, told, verbose))
    _draw_report(report, plot_file, loaded, as_json)


def _measure_completion(
    space: Workspace, references: Sequence[str], compose: bool, sessions: bool, callback: ConsoleWatch
) -> Report:
    """Encode the catalogue with and without adapters, and measure every scorer on it."""
    from peft_combo.encoder.heads.completion import CompletionHead
    from peft_combo.encoder.heads.rating import RatingHead
    from peft_combo.evaluation.completion import evaluate as run
    from peft_combo.recommender.category_calibration import CategoryCoverage

    dataset = space.dataset
    live = {reference: space.bank.get(reference) for reference in references}
    # Any other head is refused before anything is encoded.
    raters = {name: one.task_head for name, one in live.items() if isinstance(one.task_head, RatingHead)}
    heads = {name: one.head_as(CompletionHead) for name, one in live.items() if name not in raters}
    callback.on_stage("Encoding the catalogue", space.count_texts(len(live)))

    def encode(reference: str | None) -> NDArray[np.float32]:
        return space.encode_catalog(reference, callback.on_advance)

    frozen = encode(None)
    return run(
        dataset, space.split, frozen=frozen, described=space.encode_described(frozen, callback.on_advance),
        tuned={name: (encode(name), head) for name, head in heads.items()},
        rated={name: (encode(name), head) for name, head in raters.items()},
        coverage=CategoryCoverage.of(dataset.catalog, {name: live[name].record.manifest.recipe for name in heads}),
        pictures=space.encode_looks(callback.on_advance), seed=space.recipe.seed, compose=compose, sessions=sessions,
        advance=lambda name: callback.on_note(f"measured {name}"),
    )  # fmt: skip


def _refuse_leaks(space: Workspace, references: Sequence[str], callback: ConsoleWatch) -> None:
    """Refuse adapters that were tuned on other splits; note those of which that is not known."""
    from peft_combo.data.leakage import rating_problem, split_problem
    from peft_combo.encoder.heads.rating import RatingHead

    dataset, parts, config = space.dataset, space.split, space.recipe.data
    for reference, record in zip(references, space.records, strict=True):
        manifest = record.manifest
        rates = manifest.task.get("kind") == RatingHead.kind
        if problem := rating_problem(manifest, dataset, parts) if rates else split_problem(manifest, parts, config):
            raise DataError(problem)
        if manifest.imported is not None:
            callback.on_note(f"{reference} was imported: whether it has learned from these test bundles is not known.")


def _draw_report(report: Report, asked: Path | None, recipe: Recipe, as_json: bool) -> None:
    from peft_combo.evaluation.report import plot
    from peft_combo.tuning.run_folder import name_run_folder

    write_chart(lambda path: plot(report, path), asked, name_run_folder(recipe) / "test.html", as_json)


def _print_report(report: Report, told: Collection[str], verbose: bool) -> None:
    from peft_combo.evaluation.report import write_verdict

    counts, lines = report.counts, report.lines
    print_line(write_verdict(report))
    print_line(
        f"{report.dataset}: {counts['test questions']:,} questions from {counts['test bundles']:,} test bundles, "
        f"{counts['items']:,} items; split {report.split_digest[:12]}"
    )
    peers = sorted({name for line in lines for name in line.p})
    shown = ("r@1", "r@5", "r@10", "r@20", "ndcg@10")
    print_table(
        ("", *map(format_metric_name, shown), "95 % interval", "MRR", *("p" for _ in peers[:1])),
        [
            (
                line.name,
                *(f"{line.values[name]:.3f}" for name in shown),
                "{:.3f} to {:.3f}".format(*line.intervals["ndcg@10"]),
                f"{line.values['mrr']:.3f}",
                *(f"{line.p[peer]:.4f}" if peer in line.p else "" for peer in peers[:1]),
            )
            for line in lines
        ],
        numbers=True,
        best=max(range(len(lines)), key=lambda place: lines[place].values["ndcg@10"]),
    )
    if verbose:
        _print_slices(report, peers[1:])
    compared = "".join(f"p: of the difference in NDCG@10 to {peer}. " for peer in peers[:1])
    print_line(f"{compared}{report.protocol if verbose else 'Slices, settings and the protocol: --verbose.'}")
    if report.composition is not None:
        _print_composition(report.composition)
    if report.detection is not None:
        print_detection(report.detection)
    for note in report.notes:
        if note not in told:
            print_line(f"Note: {note}")


def _print_slices(report: Report, peers: Sequence[str]) -> None:
    """Print NDCG@10 on parts of the questions, what validation chose, and how all of it was measured."""
    slices = [name for name in _SLICES if name in report.lines[0].slices]
    print_line()
    print_line("NDCG@10 on parts of the questions")
    print_table(
        ("", *slices, *(f"p: {one}" for one in peers), "setting"),
        [
            (
                line.name,
                *(f"{line.slices[name].ndcg:.3f}" if name in line.slices else "" for name in slices),
                *(f"{line.p[peer]:.4f}" if peer in line.p else "" for peer in peers),
                line.setting,
            )
            for line in report.lines
        ],
        numbers=True,
    )


def _search_by_intents(space: Workspace, adapters: Sequence[str], callback: ConsoleWatch) -> QueryReport:
    """Encode the catalogue with and without adapters of bundles, and look for the test bundles by their intents."""
    from peft_combo.encoder.heads.completion import CompletionHead
    from peft_combo.evaluation.text_queries import check_intents, evaluate_queries
    from peft_combo.recommender.item_pictures import take_texts
    from peft_combo.recommender.text_search import build_views

    dataset, progress = space.dataset, callback.on_advance
    check_intents(dataset, space.split.test)
    for name in adapters:
        space.bank.get(name).head_as(CompletionHead)  # any other is refused before anything is encoded
    callback.on_stage("Encoding the catalogue", space.count_texts(len(adapters)))
    frozen = space.encode_catalog(None, progress)
    dim = space.backbone.dim
    tuned = {name: take_texts(space.encode_catalog(name, progress), dim) for name in adapters}
    views = build_views(dataset, space.bank, frozen, space.encode_described(frozen, progress), tuned)
    return evaluate_queries(dataset, space.split, views, seed=space.recipe.seed)


def _print_queries(found: QueryReport, told: Collection[str]) -> None:
    from peft_combo.evaluation.text_queries import BASELINE, TESTED, VALUES

    counts = found.counts
    print_line(
        f"{found.dataset}: {counts['queries']:,} queries of {counts['groups']:,} groups, {counts['candidates']:,} "
        f"bundles, {counts['items']:,} items; split {found.split_digest[:12]}"
    )
    heads = {name: name if name.startswith("items") else format_metric_name(name) for name in VALUES}
    first, rest = VALUES[:2], VALUES[2:]
    shown = [*(heads[name] for name in first), "95 % interval", *(heads[name] for name in rest)]
    print_table(
        ("", *shown, *(f"p: {heads[name]}" for name in TESTED)),
        [
            (
                row.name,
                *(f"{row.values[name]:.3f}" for name in first),
                "{:.3f} to {:.3f}".format(*row.intervals["r@10"]),
                *(f"{row.values[name]:.3f}" for name in rest),
                *(f"{row.p[name]:.4f}" if name in row.p else "" for name in TESTED),
            )
            for row in found.rows
        ],
        numbers=True,
    )
    weights = ", ".join(f"{name} {value:g}" for name, value in found.weights.items())
    print_line(f"The weights chosen on validation: {weights}. p: against {BASELINE}. {found.protocol}")
    for note in found.notes:
        if note not in told:
            print_line(f"Note: {note}")


def _print_composition(found: CompositionReport) -> None:
    print_line()
    print_line(f"Composition of {found.bundles:,} test bundles of {found.groups:,} groups, given one item of each")
    print_table(
        ("", "precision", "recall", "95 % interval", "exact", "Jaccard", "valid", "diversity", "p"),
        [
            (
                row.name,
                *(f"{row.values[name]:.3f}" for name in ("precision", "recall")),
                "{:.3f} to {:.3f}".format(*row.intervals["recall"]),
                *(
                    f"{row.values[name]:.3f}" if name in row.values else ""
                    for name in ("exact", "jaccard", "valid", "diversity")
                ),
                "" if row.p is None else f"{row.p:.4f}",
            )
            for row in found.rows
        ],
        numbers=True,
    )
    weights = ", ".join(f"{name} {value:g}" for name, value in found.weights.items())
    print_line(f"The composer's weights: {weights}. {found.protocol}")


def print_detection(found: DetectionReport) -> None:
    print_line()
    print_line(
        f"Detection of {found.bundles:,} bundles in {found.sessions:,} {found.part} sessions of {found.users:,} users"
    )
    print_table(
        ("", "precision", "recall", "coverage", "Jaccard", "agreement", "95 % interval", "bundles", "p"),
        [
            (
                row.name,
                *(
                    f"{row.values[name]:.3f}" if name in row.values else ""
                    for name in ("precision", "recall", "coverage", "jaccard", "agreement")
                ),
                "{:.3f} to {:.3f}".format(*row.intervals["agreement"]),
                f"{row.predicted:.2f}",
                "" if row.p is None else f"{row.p:.4f}",
            )
            for row in found.rows
        ],
        numbers=True,
    )
    for row in found.rows:
        if row.setting:
            print_line(f"{row.name}: {row.setting}")
    print_line(f"Bundles: predicted for a session. {found.protocol}")


def _judge_by_log(
    space: Workspace, references: Sequence[str], log: str, explore: str, callback: ConsoleWatch
) -> OffPolicyReport:
    """Estimate what the recommender of some adapters would have earned on logged lists."""
    from functools import partial

    from peft_combo.cli.retune import open_state
    from peft_combo.data.use import read_log
    from peft_combo.evaluation.off_policy import judge_candidate
    from peft_combo.files import literal_path
    from peft_combo.recommender.recommender import BundleRecommender
    from peft_combo.serving.exploration import CANDIDATES, Thompson, compute_propensities, parse_policy

    policy = parse_policy(explore)
    if isinstance(policy, Thompson):
        raise PeftComboError(
            "--explore: expected epsilon-greedy:SHARE or plackett-luce:TEMPERATURE, found Thompson sampling: what a "
            "candidate would draw by it hangs on what items had earned at that moment, which the log does not hold. A "
            "log that was drawn by it can be judged."
        )
    if "://" in log or literal_path(log).is_dir():
        from peft_combo.serving.learning import gather_lists

        state = open_state(log)
        try:
            lists = gather_lists(state)
        finally:
            state.close()
    else:
        lists = read_log(literal_path(log))
    callback.on_note(f"{len(lists):,} logged lists")
    _refuse_leaks(space, references, callback)
    candidate = BundleRecommender.fit(
        space.dataset, space.split, space.bank, list(references), seed=space.recipe.seed, cache=space.cache
    )

    def score(context: tuple[str, ...]) -> dict[str, float]:
        known = [item for item in context if item in space.dataset.catalog.index]
        return {one.item_id: one.score for one in candidate.complete(known, k=CANDIDATES)} if known else {}

    name = ", ".join(references) or "the frozen encoder"
    return judge_candidate(name, lists, score, partial(compute_propensities, policy=policy), seed=space.recipe.seed)


def _print_judged(found: OffPolicyReport) -> None:
    print_table(
        ("", "per list", "95 % interval", "as shown", "gain", "95 % interval", "effective", "mean weight"),
        [
            (
                name, f"{one.value:.4f}", "{:.4f} to {:.4f}".format(*one.interval), f"{one.logged:.4f}",
                f"{one.gain:+.4f}", "{:+.4f} to {:+.4f}".format(*one.gain_interval), f"{one.effective_size:,.0f}",
                f"{one.mean_weight:.3f}",
            )
            for name, one in found.estimates.items()
        ],
        numbers=True,
    )  # fmt: skip
    left = ", ".join(f"{count:,} with {reason}" for reason, count in found.left_out.items() if count)
    print_line(
        f"What {found.candidate} would have earned per list, by {found.judged:,} of {found.logged:,} logged lists"
        + (f" (left out: {left})" if left else "")
        + ". Rewards: a click, a basket or a purchase; intervals draw whole users."
    )
    first = next(iter(found.estimates.values()))
    for doubt in first.doubts:
        print_line(f"Doubt: {doubt}.")
