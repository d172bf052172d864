"""`recommend`: bundles and items for baskets, users and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
from peft_combo.cli.complete import complete_adapter, complete_path
from peft_combo.cli.output import ConsoleWatch, console_watch, print_json, print_line, print_table, split_words
from peft_combo.cli.tag import load_tagger
from peft_combo.errors import DataError

if TYPE_CHECKING:
    from peft_combo.data.labels.tags import Tagger
    from peft_combo.data.model import Dataset
    from peft_combo.recommender.query import QueryItem
    from peft_combo.recommender.recommender import BundleRecommender
    from peft_combo.recommender.requests import Request
    from peft_combo.recommender.results import DetectedBundle, Recommendation, Suggestion
    from peft_combo.recommender.workspace import Workspace

TaggerOption = Annotated[
    str | None,
    typer.Option(
        "--tagger",
        autocompletion=complete_adapter,
        help="Tagging adapter that parses the query, an item for each thing.",
    ),
]
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        autocompletion=complete_adapter,
        help="Adapter, as in fashion@v2, may be repeated; default the recipe's category.",
    ),
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option("--where", help="Condition on new items: 'price<50', 'brand=A|B', 'colour!=red'; may be repeated."),
]
CategoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--category",
        autocompletion=complete_path,
        help='Category path of new items, as in "A > B"; may be repeated.',
    ),
]
DiversityOption = Annotated[
    float | None,
    typer.Option("--diversity", help="Diversity of the list, 0 (the best) to 1 (most varied); default 0.5."),
]
NotLikeOption = Annotated[str | None, typer.Option("--not-like", help="Ids of rejected items: F1,F7.")]
ExcludeOption = Annotated[str | None, typer.Option("--exclude", help="Ids of items that are not shown: F1,F7.")]
SeenOption = Annotated[bool, typer.Option("--seen", help="With --user: also items this user took before.")]

_MANY_REQUESTS = 1_000


@app.command(short_help="Recommend bundles or items for items, a user or a text.")
def recommend(
    recipe: RecipeOption,
    items: Annotated[str | None, typer.Option("--items", help="Ids of items that every bundle holds: F1,F7.")] = None,
    session: Annotated[
        str | None, typer.Option("--session", help="Ids of a session's items, to detect the bundles in: F1,F7,F9.")
    ] = None,
    sure: Annotated[bool, typer.Option("--sure", help="With --session: smaller and surer bundles.")] = False,
    user: Annotated[str | None, typer.Option("--user", help="Id of the user to personalise for.")] = None,
    query: Annotated[str | None, typer.Option("--query", help="Query in words.")] = None,
    tagger: TaggerOption = None,
    adapters: AdaptersOption = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Frozen encoder, without any adapter.")] = False,
    single: Annotated[bool, typer.Option("--single", help="Single items that complete, in place of bundles.")] = False,
    k: Annotated[int | None, typer.Option("-k", help="Number of bundles or items; default 5.")] = None,
    slots: Annotated[str | None, typer.Option("--slots", help="Required slots of a bundle, as in top,shoes.")] = None,
    without_slots: Annotated[str | None, typer.Option("--without-slots", help="Forbidden slots of new items.")] = None,
    budget: Annotated[float | None, typer.Option("--budget", help="Maximum price of the bundle.")] = None,
    max_price: Annotated[float | None, typer.Option("--max-price", help="Maximum price of a new item.")] = None,
    season: Annotated[str | None, typer.Option("--season", help="Season of new items.")] = None,
    category: CategoryOption = None,
    size: Annotated[int | None, typer.Option("--size", help="Number of items in a bundle; default as usual.")] = None,
    in_stock: Annotated[bool, typer.Option("--in-stock", help="New items in stock only.")] = False,
    where: WhereOption = None,
    not_like: NotLikeOption = None,
    exclude: ExcludeOption = None,
    seen: SeenOption = False,
    diversity: DiversityOption = None,
    substitute: Annotated[bool, typer.Option("--substitute", help="Substitutes, in place of complements.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Explanation of every item: scores and evidence.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="File of requests to answer, a JSON object on each line.")
    ] = None,
    target: Annotated[Path | None, typer.Option("--to", help="With --from: answers, .jsonl or .parquet.")] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    cache: CacheOption = Path("vectors"),
    fitted_folder: Annotated[Path, typer.Option("--fitted", help="Folder of fitted recommenders.")] = Path("fitted"),
    as_json: JsonOption = False,
) -> None:
    """Recommend bundles or single items for items, a user or a text; detect a session's bundles; answer a file."""
    from peft_combo.files import check_folder_target
    from peft_combo.recommender.filters import parse_filter
    from peft_combo.recommender.requests import check_files, parse_request

    loaded = load_ready_recipe(recipe, overrides, data, store)
    if (source is None) != (target is None):
        raise DataError("--from FILE and --to FILE go together: requests and where their answers go.")
    if tagger is not None and query is None and source is None:
        raise DataError("--tagger takes a query apart, and there is none. Add --query, or --from with queries.")
    given = {
        "items": split_words(items), "session": split_words(session), "sure": sure, "user": user, "query": query,
        "single": single, "k": k, "slots": split_words(slots), "without_slots": split_words(without_slots),
        "budget": budget, "max_price": max_price, "season": season, "categories": category, "size": size,
        "in_stock": in_stock, "diversity": diversity, "substitute": substitute, "explain": explain,
        "filter": parse_filter(where).model_dump(exclude_none=True) if where else None,
        "not_like": split_words(not_like), "exclude": split_words(exclude), "exclude_seen": False if seen else None,
    }  # fmt: skip
    request = parse_request({name: value for name, value in given.items() if value is not None})
    count = 0 if source is None or target is None else check_files(source, target)
    check_folder_target(fitted_folder)
    with console_watch() as callback:
        references = [] if frozen else adapters or [loaded.category]
        space = open_workspace(
            loaded, recipe, overrides, data, store, references, cache=cache, on_note=callback.on_note
        )
        _check_request(space, request, source is not None)
        if source is None and tagger is None:
            _check_feasible(space.dataset, request)
        find_entities = None if tagger is None else load_tagger(tagger, Path(loaded.store))
        fitted = _fit_recommender(space, references, fitted_folder, callback)
        if source is not None and target is not None:
            if count >= _MANY_REQUESTS:  # so many that building indexes is made up for
                fitted = fitted.with_retrieval()
            callback.on_stage("Answering", count)
            _answer_file(fitted, source, target, request, find_entities, callback)
            return
        found = _answer_request(fitted, request, find_entities, callback)
    _print_answers(request, found, as_json)


def _check_request(space: Workspace, request: Request, from_file: bool) -> None:
    """Refuse ids, columns, values and slots that are not there before anything is loaded or encoded."""
    from peft_combo.recommender.composing.constraints import CatalogIndex
    from peft_combo.recommender.composing.slots import SlotTemplates

    asked = (request.items, request.session, request.user, request.query)
    if not from_file and not any(one is not None and one != [] for one in asked):
        raise DataError('Nothing to go by: give items, a user or a query, as in --query "linen dress".')
    named = [*request.items, *(request.session or ()), *request.not_like, *request.exclude]
    if named:
        space.dataset.find_items(named)
    if request.user is not None:
        space.dataset.find_user(request.user)
    CatalogIndex(space.dataset.catalog).check(request.constraints)
    if request.slots or request.without_slots:
        templates = SlotTemplates.learn(space.dataset.catalog, space.dataset.bundles.items)
        for name in (*(request.slots or ()), *(request.without_slots or ())):
            templates.find_slot(name)


def _check_feasible(dataset: Dataset, request: Request) -> None:
    """Refuse a bundle that prices, slots and rules of the catalogue alone show to be impossible, as composing would."""
    import numpy as np

    from peft_combo.data.knowledge.rule_set import RuleSet
    from peft_combo.recommender.composing.composer import Composer
    from peft_combo.recommender.composing.constraints import Constraints
    from peft_combo.recommender.composing.slots import SlotTemplates

    bound = request.constraints != Constraints() or request.slots or request.without_slots
    if request.session is not None or request.single or not bound:
        return
    barred = [dataset.find_items([*request.not_like, *request.exclude])]
    if request.user is not None and request.exclude_seen and dataset.interactions is not None:
        taken, starts = dataset.interactions.list_taken(len(dataset.catalog))
        row = dataset.find_user(request.user)
        barred.append(taken[starts[row] : starts[row + 1]])
    templates = SlotTemplates.learn(dataset.catalog, dataset.bundles.items)
    templates = templates.with_rules(required=request.slots, forbidden=request.without_slots)
    composer = Composer(dataset.catalog, templates, rules=RuleSet.of(dataset.knowledge, dataset.catalog))
    constraints = request.constraints.bar(np.concatenate(barred))
    composer.check_feasible(dataset.find_items(request.items), constraints, request.options)


def _answer_request(
    recommender: BundleRecommender, request: Request, tagger: Tagger | None, callback: ConsoleWatch
) -> list[Suggestion] | list[Recommendation] | list[DetectedBundle]:
    """Answer a request; note what was understood of its query, and what of it nothing answers."""
    from peft_combo.recommender.query import parse_query
    from peft_combo.recommender.requests import answer

    parsed = None
    if request.query is not None and tagger is not None:
        parsed = parse_query(request.query, tagger)
        callback.on_note(f"Understood: {parsed}")
    found = answer(recommender, request, tagger)
    if parsed is not None and (missing := _find_missing(parsed.items, found)):
        callback.on_note(f"Nothing in the catalogue answers: {', '.join(missing)}")
    return found


def _answer_file(
    recommender: BundleRecommender, source: Path, target: Path, defaults: Request, tagger: Tagger | None,
    callback: ConsoleWatch,
) -> None:  # fmt: skip
    """Answer a file of requests and print how many were; fail where one has no answer."""
    from peft_combo.recommender.requests import answer_file

    done = answer_file(recommender, source, target, defaults, callback.on_advance, tagger)
    callback.close()
    print_line(f"{done.requests - len(done.errors):,} of {done.requests:,} requests answered in {target}")
    if done.errors:
        line, error = next(iter(done.errors.items()))
        raise DataError(
            f"{len(done.errors):,} of {done.requests:,} requests have no answer; {target} says why beside each. "
            f"The first, line {line}: {error}"
        ) from done.fault


def _find_missing(items: Sequence[QueryItem], found: Sequence[object]) -> list[str]:
    """Return the names of query items that no item of any bundle answers."""
    evidence = [entry for one in found for entry in getattr(one, "evidence", ())]
    answered = {told["wish"] for entry in evidence for told in entry.get("answers", ())}
    return [item.name for item in items if item.name not in answered]


def _fit_recommender(
    space: Workspace, adapters: Sequence[str], folder: Path, callback: ConsoleWatch
) -> BundleRecommender:
    """Return the fitted recommender kept in `folder`, or fit one; note what it was fitted without."""
    from peft_combo.recommender.persistence import load_or_fit

    callback.on_stage("Encoding the catalogue", space.count_texts(len(adapters)))
    made = load_or_fit(
        folder, space.dataset, space.split, space.bank, adapters, seed=space.recipe.seed,
        cache=space.cache, progress=callback.on_advance, done=lambda name: callback.on_note(f"fitted {name}"),
    )  # fmt: skip
    for note in made.state.notes:
        callback.on_note(f"Note: {note}")
    return made


def _print_answers(
    request: Request, found: list[Suggestion] | list[Recommendation] | list[DetectedBundle], as_json: bool
) -> None:
    if as_json:
        print_json([asdict(one) for one in found])
    elif request.session is not None:
        _print_detected(cast("list[DetectedBundle]", found), request.explain)
    elif request.single:
        _print_suggestions(cast("list[Suggestion]", found), request.explain)
    else:
        _print_bundles(cast("list[Recommendation]", found), request.explain)


def _print_suggestions(suggestions: Sequence[Suggestion], explain: bool) -> None:
    rows = []
    for one in suggestions:
        why = ""
        if explain:
            words = ", ".join(f"{reason} {share:+.2f}" for reason, share in one.reasons.items())
            shares = ", ".join(f"{name} {share:+.2f}" for name, share in one.shares.items())
            together = ", ".join(f"{_count_bundles(count)} with {item}" for item, count in one.together.items())
            because = ", ".join(f"{share:+.2f} for {item}" for item, share in one.because.items())
            why = "; ".join(filter(None, (words, together, shares, because)))
        price = "" if one.price is None else f"{one.price:.2f}"
        rows.append((one.item_id, one.title, one.slot or "", price, f"{one.score:.2f}", why))
    header, shown = ("item", "title", "slot", "price", "score", "why"), 6 if explain else 4
    print_table(header[:shown], [row[:shown] for row in rows])


def _print_bundles(bundles: Sequence[Recommendation], explain: bool) -> None:
    for place, bundle in enumerate(bundles, 1):
        parts = ", ".join(f"{name} {value:+.2f}" for name, value in bundle.parts.items())
        score = f", score {bundle.score:.2f} ({parts})" if explain else ""
        print_line(f"{place}. {_sum_up(len(bundle.items), bundle.price)}{score}")
        why = {entry["item"]: entry for entry in bundle.evidence}
        rows = []
        for item, title, slot, cost in zip(bundle.items, bundle.titles, bundle.slots, bundle.prices, strict=True):
            reason = "given" if item not in bundle.added else _format_reason(why.get(item, {}))
            rows.append((f"   {slot}", item, title, "" if cost is None else f"{cost:,.2f}", reason))
        print_table(("   slot", "item", "title", "price", "why"), rows)
        for item in bundle.added if explain else ():
            if item in why:
                print_line(f"   {item}: {_format_reasons(why[item])}")


def _sum_up(items: int, price: float | None) -> str:
    return f"{items} item{'' if items == 1 else 's'}" + ("" if price is None else f", {price:,.2f} in all")


def _format_reason(entry: Mapping[str, Any]) -> str:
    """Say in words why an item is in a bundle: what it answers, what was counted, and what it has in common."""
    reasons = [f"answers {one['wish']}" for one in entry.get("answers", ())]
    reasons += _format_relations(entry)
    if "together" in entry:
        reasons.append(f"with {entry['together']['with']} in {_count_bundles(entry['together']['bundles'])}")
    agrees = dict(entry.get("agrees", {}))
    whom = agrees.pop("for", None)
    if agrees:
        reasons.append(f"same {', '.join(list(agrees)[:3])}")
    if whom is not None:
        reasons.append(f"for {whom}")
    if not reasons and "rule" in entry:
        rule = entry["rule"]
        reasons.append(f"{rule['confidence']:.0%} of bundles with {rule['given']} have {rule['slot']}")
    return "; ".join(reasons)


def _format_relations(entry: Mapping[str, Any]) -> list[str]:
    """Say in which relations an item is, and by which rules it is required."""
    related = entry.get("related", ())
    said = [
        f"{one['relation']} {one['with']}" if one["head"] else f"{one['with']} {one['relation']} it" for one in related
    ]
    return said + [f"required by {one['by']} ({one['rule']})" for one in entry.get("required", ())]


def _print_detected(bundles: Sequence[DetectedBundle], explain: bool) -> None:
    for place, bundle in enumerate(bundles, 1):
        score = f", score {bundle.score:.2f}" if explain else ""
        print_line(f"{place}. {_sum_up(len(bundle.items), bundle.price)}{score}")
        header, shown = ("   slot", "item", "title", "belongs"), 4 if explain else 3
        rows = [
            (f"   {slot}", item, title, f"{belongs:.2f}")[:shown]
            for slot, item, title, belongs in zip(
                bundle.slots, bundle.items, bundle.titles, bundle.belongs, strict=True
            )
        ]
        print_table(header[:shown], rows)


def _format_reasons(entry: Mapping[str, Any]) -> str:
    """Say why an item is in a bundle: what was counted and read first, in words, then what each part adds."""
    reasons = []
    if "answers" in entry:
        told = [one["wish"] + ("" if one["named"] else f", as another {one['type']}") for one in entry["answers"]]
        reasons.append(f"answers: {'; '.join(told)}")
    if "agrees" in entry:
        reasons.append("both " + ", ".join(f"{name} {value}" for name, value in entry["agrees"].items()))
    reasons += _format_relations(entry)
    if "together" in entry:
        reasons.append(f"in {_count_bundles(entry['together']['bundles'])} with {entry['together']['with']}")
    if "rule" in entry:
        rule = entry["rule"]
        share = f"{rule['confidence']:.0%} of bundles with {rule['given']} have {rule['slot']}"
        reasons.append(f"{share} ({rule['support']} of {rule['of']})")
    if "because" in entry:
        reasons.append("goes with " + ", ".join(f"{item} {gain:+.2f}" for item, gain in entry["because"].items()))
    reasons.append(", ".join(f"{part} {entry[part]:+.2f}" for part in ("relevance", "compatibility", "agreement")))
    if "scorers" in entry:
        reasons.append(", ".join(f"{name} {share:+.2f}" for name, share in entry["scorers"].items()))
    return "; ".join(reasons)


def _count_bundles(count: int) -> str:
    return "1 bundle" if count == 1 else f"{count:,} bundles"
