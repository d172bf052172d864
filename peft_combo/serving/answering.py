"""Answering of a request from one release: what it goes by, who answers where the fusion cannot, and what is shown.

Owns the order fusion, texts, counts, popularity, and the words of results. Takes a release once and keeps it to the end
of the request, so that no answer mixes two.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from peft_combo.errors import DataError, PeftComboError, did_you_mean, shorten
from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.fallbacks import score_by_counts, score_by_popularity, score_by_texts
from peft_combo.recommender.item_ranking import ItemRanking
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.results import Recommendation, Suggestion
from peft_combo.serving.answers import Answer, AnsweredBy, Arm, Origin
from peft_combo.serving.arms import DeployedRelease
from peft_combo.serving.cursors import MOST_BUNDLES, Cursor, digest_bundle, digest_request, split_digests
from peft_combo.serving.drawing import ListDrawer
from peft_combo.serving.errors import BadRequest, CursorExpired
from peft_combo.serving.exploration import CANDIDATES
from peft_combo.serving.live_events import LiveEvents, list_context, list_seen
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.score_batching import ScoreBatcher, WaitingContext
from peft_combo.serving.state import EventRow
from peft_combo.serving.turns import Turns

Route = Literal["recommend", "complete", "compose", "replace", "search", "rank"]

_CONTEXT = 5  # items a user dealt with last that stand for them, as in the recommender
_WIDE = 0.25  # from this share of items that may be shown on, candidates of all items are enough
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Asked:
    """A request in terms of one release.

    Attributes:
        items: ids that are known. context: ids that stand for the request: `items`, or what the user dealt with last.
        user: as the dataset knows them; None where it does not.
        exclude: ids that are not shown. notes: what was noticed.
        waiting: what is scored, the context but for an item that is swapped; None where scores are not asked for.
    """

    request: ServiceRequest
    items: tuple[str, ...]
    context: tuple[str, ...]
    user: str | None
    exclude: tuple[str, ...]
    notes: tuple[str, ...]
    waiting: WaitingContext | None


class Answerer:
    """Answers requests from a release that is handed in.

    Args:
        identify: the key of a user id. is_forgotten: whether somebody asked to be forgotten.
        drawer: draws lists for a person or items.
    """

    def __init__(
        self, events: LiveEvents, identify: Callable[[str], str], is_forgotten: Callable[[str], bool],
        drawer: ListDrawer,
    ) -> None:  # fmt: skip
        self._events, self._identify, self._is_forgotten = events, identify, is_forgotten
        self._drawer = drawer
        self._turns, self._scores = Turns(), ScoreBatcher()

    def answer(self, route: Route, request: ServiceRequest, alias: str, arm: Arm, deployed: DeployedRelease) -> Answer:
        """Answer one request.

        Raises:
            DataError: it cannot be answered as it stands; so do all kinds of `ServiceError`.
        """
        started = time.perf_counter()
        release, recommender = deployed.release, deployed.view.recommender
        cursor = None if request.cursor is None else Cursor.decode(request.cursor)
        if cursor is not None:
            cursor.check(release.release, digest_request(request), route)
        request_id = request.request_id or uuid.uuid4().hex
        propensities: tuple[float, ...] = ()
        if request.query is not None and request.query.strip():
            recommender.state.search.encode_ahead([request.query])  # in a batch with others, before its turn
        asked = self._understand(route, request, recommender, cursor)
        understood = time.perf_counter()
        with ExitStack() as line:
            if asked.waiting is not None:
                line.enter_context(self._scores.stand_in_line(asked.waiting))
            line.enter_context(self._turns)
            if route in ("compose", "rank"):
                results, by, tried, notes, following = self._answer_bundles(
                    route, asked, recommender, cursor, release.release
                )
            else:
                results, by, tried, notes, following, propensities = self._answer_items(
                    route, asked, recommender, cursor, release.release, request_id
                )
        done = time.perf_counter()
        deployed.counts.add(done - started)
        origin = Origin(alias, release.version, release.digest, release.release, arm, by, tried)
        return Answer(
            request_id, tuple(results), following, origin, 1e3 * (done - started),
            (*asked.notes, *notes), {"read": 1e3 * (understood - started), "score": 1e3 * (done - understood)},
            propensities,
        )  # fmt: skip

    # What a request goes by.

    def _understand(
        self, route: Route, request: ServiceRequest, recommender: BundleRecommender, cursor: Cursor | None
    ) -> Asked:
        notes: list[str] = []
        items = _keep_known(recommender, request.items, notes, "left out of what the answer goes by")
        exclude = [one for one in request.exclude if one in recommender.dataset.catalog.index]
        user, events = self._find_user(request, recommender)
        if request.user is not None and user is None and not events:
            by = "items" if items else "the query" if request.query else "popularity"
            notes.append(f"Nothing is known of this user, so the answer goes by {by}.")
        context: Sequence[str] = items
        if not items and events:
            recent = _keep_known(recommender, list_context(events, _CONTEXT), [], "")
            if user is not None and recent:
                rows = recommender.find_context(np.empty(0, np.int64), user).tolist()
                recent += [recommender.dataset.catalog.item_ids[row] for row in rows]
            context = list(dict.fromkeys(recent))[:_CONTEXT]
        if cursor is not None and cursor.context is not None:
            context = _keep_known(recommender, cursor.context, [], "")
        if request.exclude_seen and events:
            seen = set(list_seen(events)) - set(items)
            exclude += [one for one in seen if one in recommender.dataset.catalog.index]
        asked = Asked(request, tuple(items), tuple(context), user, tuple(exclude), tuple(notes), None)
        if _goes_by_words(route, asked):
            return asked
        given = [one for one in context if route != "replace" or one != request.swap]
        rows = recommender.find_context(recommender.dataset.find_items(given), user)
        plain = route in ("recommend", "complete") and request.query is None and not request.not_like
        return replace(asked, waiting=WaitingContext(recommender, rows, user, _find_depth(request) if plain else None))

    def _find_user(
        self, request: ServiceRequest, recommender: BundleRecommender
    ) -> tuple[str | None, tuple[EventRow, ...]]:
        """Return a user as the dataset knows them, and what they did since."""
        if request.user is None:
            return None, ()
        key = self._identify(request.user)
        events = self._events.find(key)
        known = recommender.dataset.knows_user(request.user) and not self._is_forgotten(key)
        return (request.user if known else None), events

    # Single items.

    def _answer_items(
        self, route: Route, asked: Asked, recommender: BundleRecommender, cursor: Cursor | None, release: str,
        request_id: str,
    ) -> tuple[
        list[dict[str, Any]], AnsweredBy, tuple[AnsweredBy, ...], tuple[str, ...], str | None, tuple[float, ...]
    ]:  # fmt: skip
        request = asked.request
        if route == "search" and request.query is None:
            raise BadRequest("query: a search needs words. For items beside others ask /v1/complete.")
        if route == "complete" and not (asked.items or request.items or request.user):
            raise DataError("Nothing to go by: give items or a user. For words alone ask /v1/search.")
        if route == "replace" and (request.swap is None or not request.items):
            raise BadRequest("swap: expected items, a bundle, and of these the one to replace in swap.")
        by, tried, notes, ranking = self._rank(route, asked, recommender)
        after: int | None = None
        propensities: tuple[float, ...] = ()
        if cursor is not None:
            after = recommender.dataset.catalog.index.get(cursor.after)
            if after is None or not np.isfinite(ranking.fused.scores[after]):
                raise CursorExpired("The item that the list ended with is gone. Send the request again without cursor.")
        rows = ranking.take(request.k + 1, after)
        more, rows = len(rows) > request.k, rows[: request.k]
        drawn = self._draw(route, request, recommender, ranking, cursor, request_id)
        if drawn is not None:  # an item of a later page may be on this one, so there is none
            rows, propensities = drawn
            more = False
        found = recommender.describe_items(ranking, rows, explain=request.explain)
        results = [_tell_item(recommender, one, row) for one, row in zip(found, rows, strict=True)]
        if route == "replace" and request.swap is not None:
            _add_bundle_price(recommender, results, [one for one in asked.items if one != request.swap])
        if not results and after is None:
            notes = (*notes, "No item meets all conditions.")
        following = None
        if more:
            shown = len(rows) + (0 if cursor is None else cursor.shown)
            last = recommender.dataset.catalog.item_ids[rows[-1]]
            following = _write_cursor(route, asked, release, last, shown)
        return results, by, tried, notes, following, propensities

    def _draw(
        self, route: Route, request: ServiceRequest, recommender: BundleRecommender, ranking: ItemRanking,
        cursor: Cursor | None, request_id: str,
    ) -> tuple[list[int], tuple[float, ...]] | None:  # fmt: skip
        """Return the rows that are shown and their propensities, where lists are drawn; None where they are not."""
        if cursor is not None or not self._drawer.draws(route, request.k):
            return None
        pool = ranking.take(CANDIDATES, None)
        if not len(pool):
            return None
        ids = recommender.dataset.catalog.item_ids
        found = self._drawer.draw([ids[row] for row in pool], ranking.fused.scores[pool], request.k, request_id)
        return [int(pool[place]) for place in found.order], tuple(found.propensities.tolist())

    def _rank(
        self, route: Route, asked: Asked, recommender: BundleRecommender
    ) -> tuple[AnsweredBy, tuple[AnsweredBy, ...], tuple[str, ...], ItemRanking]:
        request = asked.request
        depth = _find_depth(request)
        slots, without = request.slots, request.without_slots
        not_like = [one for one in request.not_like if one in recommender.dataset.catalog.index]

        def rank(fused: FusedScores | None) -> ItemRanking:
            if route == "replace" and request.swap is not None:
                return recommender.rank_replacements(
                    asked.items, request.swap, user=asked.user, constraints=request.constraints, not_like=not_like,
                    exclude=asked.exclude, exclude_seen=request.exclude_seen, fused=fused, depth=depth,
                )  # fmt: skip
            barred = (*asked.exclude, *asked.context) if not asked.items else asked.exclude
            return recommender.rank_items(
                asked.items, user=asked.user, query=request.query,
                constraints=request.constraints, required=slots, forbidden=without, not_like=not_like,
                exclude=barred, exclude_seen=request.exclude_seen, fused=fused, depth=depth,
            )  # fmt: skip

        if route == "replace" and len(asked.items) == 1:
            return "text", (), (), rank(None)
        if asked.waiting is None:
            words = replace(asked, user=None, items=(), context=())
            ranking = recommender.rank_items(
                query=request.query, constraints=request.constraints, required=slots, forbidden=without,
                not_like=not_like, exclude=(*words.exclude, *asked.items), depth=depth,
            )  # fmt: skip
            return "text", (), (), ranking
        by, tried, notes, fused = self._score(asked.waiting)
        ranking = rank(fused)
        if not fused.whole and np.mean(ranking.allowed) < _WIDE:  # candidates were found among all, few may be shown
            waiting = asked.waiting
            (fused,) = recommender.score_contexts([(waiting.rows, waiting.user)], depth, ranking.allowed)
            ranking = rank(fused)
        return by, tried, notes, replace(ranking, context=asked.waiting.rows) if asked.context else ranking

    def _score(
        self, waiting: WaitingContext
    ) -> tuple[AnsweredBy, tuple[AnsweredBy, ...], tuple[str, ...], FusedScores]:
        """Return the scores of the first that has any to give, and who was asked before."""
        rows, state = waiting.rows, waiting.recommender.state
        some = len(rows) > 0 or waiting.user is not None
        steps: list[tuple[AnsweredBy, Callable[[], FusedScores | None]]] = [
            ("fusion", lambda: self._scores.score(waiting) if some else None),
            ("text", lambda: score_by_texts(state, rows)),
            ("cf", lambda: score_by_counts(state, rows)),
            ("popularity", lambda: score_by_popularity(state)),
        ]
        tried: list[AnsweredBy] = []
        notes: list[str] = []
        for name, score in steps:
            try:
                fused = score()
                if fused is not None and np.isfinite(np.delete(fused.scores, rows)).any():
                    if tried and rows.size:
                        notes.append(f"{tried[0].title()} had nothing to say, so the answer goes by {name}.")
                    return name, tuple(tried), tuple(notes), fused
            except PeftComboError:
                raise
            except Exception as error:  # an answer by less is better than none; the fault is logged and counted
                _LOG.exception("%s failed", name)
                notes.append(f"{name.title()} failed ({type(error).__name__}).")
            tried.append(name)
        raise DataError("Nothing to go by: the catalogue is empty.")

    # Bundles.

    def _answer_bundles(
        self, route: Route, asked: Asked, recommender: BundleRecommender, cursor: Cursor | None, release: str
    ) -> tuple[list[dict[str, Any]], AnsweredBy, tuple[AnsweredBy, ...], tuple[str, ...], str | None]:
        request = asked.request
        by: AnsweredBy = "text"
        tried: tuple[AnsweredBy, ...] = ()
        notes: tuple[str, ...] = ()
        fused: FusedScores | None = None
        if route == "rank":
            if not request.bundles:
                raise BadRequest("bundles: expected bundles to rank, each a list of ids.")
            by = "fusion" if asked.items or asked.user is not None else "text"
            found = recommender.rank(
                request.bundles, items=asked.items, user=asked.user, query=request.query, explain=request.explain
            )
            return [_tell_bundle(one) for one in found], by, tried, notes, None
        before = [] if cursor is None else split_digests(cursor.after)
        if asked.waiting is not None:
            by, tried, notes, fused = self._score(asked.waiting)
        not_like = [one for one in request.not_like if one in recommender.dataset.catalog.index]
        found = recommender.compose(
            asked.items, user=asked.user, query=request.query, constraints=request.constraints,
            required=request.slots, forbidden=request.without_slots,
            options=replace(request.options, k=len(before) + request.k), not_like=not_like,
            exclude=asked.exclude, exclude_seen=request.exclude_seen, fused=fused, explain=request.explain,
        )  # fmt: skip
        digests = [digest_bundle(one.items) for one in found]
        page = [place for place, digest in enumerate(digests) if digest not in before][: request.k]
        if before and not page:
            notes = (*notes, "That was all.")
        following = None
        shown = [*before, *(digests[place] for place in page)]
        if len(page) == request.k and len(shown) < MOST_BUNDLES:
            following = _write_cursor(route, asked, release, "".join(shown), len(shown))
        return [_tell_bundle(found[place]) for place in page], by, tried, notes, following


def _write_cursor(route: Route, asked: Asked, release: str, after: str, shown: int) -> str:
    context = None if asked.request.items or asked.request.user is None else asked.context
    return Cursor(release, digest_request(asked.request), route, after, shown, context).encode()


def _find_depth(request: ServiceRequest) -> int | None:
    """Return how many of the best items an answer takes: the first page and what lists are drawn from.

    None for a later page, which is found in all there is.
    """
    return None if request.cursor is not None else max(request.k + 1, CANDIDATES)


def _goes_by_words(route: Route, asked: Asked) -> bool:
    """Tell whether a request is answered without scores of a context or a user."""
    if route == "replace":
        return len(asked.items) == 1
    words = asked.request.query is not None and not asked.context and asked.user is None
    return route in ("search", "rank") or words


def _keep_known(recommender: BundleRecommender, ids: Sequence[str], notes: list[str], what: str) -> list[str]:
    """Return the ids that there are, each once; note the others."""
    index = recommender.dataset.catalog.index
    missing = [one for one in ids if one not in index]
    if missing and what:
        hint = did_you_mean(missing[0], index) if len(index) <= 20_000 else ""
        named = ", ".join(shorten(one, 40) for one in missing[:5]) + (" and more" if len(missing) > 5 else "")
        notes.append(f"Not known, so {what}: {named}. {hint}".rstrip())
    return [one for one in dict.fromkeys(ids) if one in index]


def _tell_item(recommender: BundleRecommender, one: Suggestion, row: int) -> dict[str, Any]:
    path = recommender.dataset.catalog.categories[row]
    price = None if one.price is None else round(one.price, 2)  # float32 in the catalogue
    return {**vars(one), "price": price, "category": " > ".join(path) or None}


def _tell_bundle(one: Recommendation) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(one).items()}


def _add_bundle_price(recommender: BundleRecommender, results: list[dict[str, Any]], rest: Sequence[str]) -> None:
    """Say what the bundle costs with each replacement; None where a price is not known."""
    catalog = recommender.dataset.catalog
    spent = float(np.sum(catalog.prices[[catalog.index[item] for item in rest]])) if rest else 0.0
    for one in results:
        known = one["price"] is not None and not np.isnan(spent)
        one["bundle_price"] = round(spent + one["price"], 2) if known else None
