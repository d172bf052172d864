"""The engine of the service over a tiny real encoder: answers, fallbacks, live items and events, promotions."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_shop import Served

from peft_combo.errors import DataError, PeftComboError
from peft_combo.recommender.fitted_scorers import FittedScorer
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.scorer_id import FROZEN, PEER
from peft_combo.scoring import EASE, CoOccurrence, ItemKNN, Popularity
from peft_combo.serving import answering
from peft_combo.serving.answers import Answer, ShownAnswer
from peft_combo.serving.config import make_config
from peft_combo.serving.errors import (
    BadRequest,
    Conflict,
    CursorExpired,
    NotReady,
    RefusedRelease,
    UnknownAdapter,
    UnknownItem,
)
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.service import Service
from peft_combo.serving.state import ExposureRow, FeedbackRow, ShownItem, State, StateError
from peft_combo.store.adapter_store import AdapterStore

ALIAS = "tiny@prod"


class Shop:
    """A store of one's own, a state, and services over them that are closed at the end."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.store = folder / "adapters"
        shutil.copytree(served.store, self.store)
        self.notes: list[str] = []
        self._opened: list[Service] = []
        self._states: list[State] = []

    def open(self, **more: Any) -> Service:
        state = State.open(self.folder / "state")
        values = self.served.settings(self.folder / "state", store=self.store, poll_ms=20, **more)
        service = Service.open(make_config(values), state, self.notes.append)
        self._opened.append(service)
        self._states.append(state)
        return service

    def close(self) -> None:
        for service in self._opened:
            service.close()
        for state in self._states:
            state.close()


@pytest.fixture
def shop(served: Served, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(served, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def calm(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that no test changes."""
    made = Shop(served, tmp_path_factory.mktemp("calm"))
    yield made.open()
    made.close()


def ask(**values: Any) -> ServiceRequest:
    return ServiceRequest(**values)


def ids(answer: Answer) -> list[str]:
    return [one["item_id"] for one in answer.results]


def test_an_answer_tells_its_origin_and_is_that_of_the_recommender(calm: Service) -> None:
    answer = calm.complete(ask(items=["p0", "p6"], k=5, request_id="r1"))
    told = answer.to_json()
    assert list(told) == ["request_id", "results", "next_cursor", "took_ms", "origin", "notes"]
    assert told["request_id"] == "r1"
    assert told["origin"] | {"digest": "", "release": ""} == {
        "alias": ALIAS, "version": "tiny@v1", "digest": "", "release": "", "arm": "prod", "answered_by": "fusion",
        "fallbacks": [],
    }  # fmt: skip
    base = calm._deployments.releases()[0].base
    assert ids(answer) == [one.item_id for one in base.complete(["p0", "p6"], k=5)]
    assert answer.results[0]["category"].startswith("Shop > ")
    assert calm.ready


def test_users_are_not_shown_what_they_took_unless_they_ask(calm: Service) -> None:
    taken = {calm.dataset.catalog.item_ids[row] for row in calm._deployments.releases()[0].base._find_taken("u3")}
    assert len(taken) == 4
    shown = calm.recommend(ask(user="u3", k=96))
    assert not taken & set(ids(shown))
    again = calm.recommend(ask(user="u3", items=["p1"], k=96, exclude_seen=False))
    assert taken - {"p1"} <= set(ids(again))
    bundles = calm.compose(ask(user="u3", k=5)).results
    assert not any(taken & set(one["items"]) for one in bundles)


def test_filters_are_applied_before_the_best_are_taken(calm: Service) -> None:
    must = {"must": [{"column": "brand", "any": ["acme"]}, {"column": "price", "lt": 50}],
            "must_not": [{"column": "stock", "any": [0]}]}  # fmt: skip
    answer = calm.complete(ask(items=["p0"], k=96, filter=must))
    rows = [calm.dataset.catalog.index[item] for item in ids(answer)]
    catalog = calm.dataset.catalog
    expected = [
        row for row in range(96)
        if catalog.attributes["brand"][row] == "Acme" and catalog.prices[row] < 50
        and catalog.attributes["stock"][row] != "0" and row != 0
    ]  # fmt: skip
    assert sorted(rows) == expected
    with pytest.raises(DataError, match=r'no column "brnd".*Did you mean "brand"'):
        calm.complete(ask(items=["p0"], filter={"must": [{"column": "brnd", "any": ["x"]}]}))
    with pytest.raises(DataError, match="Acme"):
        calm.search(ask(query="w10", filter={"must": [{"column": "brand", "any": ["Acne"]}]}))


def test_replacements_are_of_the_slot_and_within_the_budget(calm: Service) -> None:
    bundle = ["p0", "p6", "p12"]  # a top, a bottom and shoes of one style
    answer = calm.replace(ask(items=bundle, swap="p6", k=50, budget=120))
    assert answer.results
    prices = calm.dataset.catalog.prices
    for one in answer.results:
        assert one["slot"] == "bottom"
        assert one["item_id"] not in bundle
        assert one["bundle_price"] == pytest.approx(prices[0] + prices[12] + one["price"], abs=0.01)
        assert one["bundle_price"] <= 120
    with pytest.raises(DataError, match="not of the bundle"):
        calm.replace(ask(items=bundle, swap="p30"))


def test_who_answers_is_named_and_said(calm: Service) -> None:
    assert calm.search(ask(query="w10", k=3)).origin.answered_by == "text"
    nobody = calm.recommend(ask(user="stranger", k=3))
    assert (nobody.origin.answered_by, nobody.origin.fallbacks) == ("popularity", ("fusion", "text", "cf"))
    assert "Nothing is known of this user" in nobody.notes[0]
    assert calm.compose(ask(user="stranger", k=1)).origin.answered_by == "popularity"
    by_items = calm.recommend(ask(user="stranger", items=["p0"], k=3))
    assert (by_items.origin.answered_by, len(by_items.notes)) == ("fusion", 1)
    lost = calm.complete(ask(items=["p0", "nope"], k=3))
    assert lost.origin.answered_by == "fusion"
    assert "nope" in lost.notes[0]


@pytest.mark.parametrize(
    ("silent", "by"), [((), "fusion"), (("fusion",), "text"), (("fusion", "text"), "cf"),
                       (("fusion", "text", "cf"), "popularity")],
)  # fmt: skip
def test_where_one_has_nothing_to_say_the_next_answers(
    calm: Service, monkeypatch: pytest.MonkeyPatch, silent: tuple[str, ...], by: str
) -> None:
    if "fusion" in silent:
        monkeypatch.setattr(type(calm._deployments.releases()[0].base), "score_contexts", _raise)
    if "text" in silent:
        monkeypatch.setattr(answering, "score_by_texts", lambda state, rows: None)
    if "cf" in silent:
        monkeypatch.setattr(answering, "score_by_counts", lambda state, rows: None)
    answer = calm.complete(ask(items=["p0"], k=3))
    assert (answer.origin.answered_by, answer.origin.fallbacks) == (by, silent)
    assert len(answer.results) == 3
    assert "p0" not in ids(answer)
    bundle = calm.compose(ask(items=["p0"], k=1))
    assert bundle.origin.answered_by == by
    assert "p0" in bundle.results[0]["items"]


def test_many_contexts_at_once_have_the_scores_they_have_alone(calm: Service) -> None:
    recommender = calm._deployments.releases()[0].base
    events = recommender.dataset.interactions
    assert events is not None
    users = [None, events.user_ids[0], None, events.user_ids[3]]
    given = [["p0"], [], ["p3", "p1", "p7"], ["p9"]]
    asked = [
        (recommender.find_context(recommender.dataset.find_items(items), user), user)
        for items, user in zip(given, users, strict=True)
    ]
    for (rows, user), together in zip(asked, recommender.score_contexts(asked), strict=True):
        alone = recommender.score_context(rows, user)
        np.testing.assert_allclose(together.scores, alone.scores, rtol=2e-5, atol=2e-5)
        assert together.parts.keys() == alone.parts.keys()
        for name, part in together.parts.items():
            np.testing.assert_allclose(part, alone.parts[name], rtol=2e-5, atol=2e-5, err_msg=str(name))


def _raise(*_: Any) -> None:
    raise RuntimeError("made to fail")


def test_a_cursor_goes_on_where_the_list_ended(calm: Service) -> None:
    whole = ids(calm.complete(ask(items=["p0"], k=95)))
    found: list[str] = []
    cursor = None
    while len(found) < 95:
        page = calm.complete(ask(items=["p0"], k=20, cursor=cursor))
        found += ids(page)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == whole
    first = calm.complete(ask(items=["p0"], k=20))
    with pytest.raises(BadRequest, match="another request"):
        calm.complete(ask(items=["p1"], k=20, cursor=first.next_cursor))
    with pytest.raises(BadRequest, match="expected the next_cursor"):
        calm.complete(ask(items=["p0"], cursor="bm90IGEgY3Vyc29y"))


def test_no_bundle_comes_twice_on_the_pages_of_a_list(calm: Service) -> None:
    asked: dict[str, Any] = {"items": ["p0", "p6"], "k": 4, "size": 3}
    pages = [calm.compose(ask(**asked))]
    while pages[-1].next_cursor is not None and len(pages) < 4:
        pages.append(calm.compose(ask(**asked, cursor=pages[-1].next_cursor)))
    found = [frozenset(one["items"]) for page in pages for one in page.results]
    assert len(pages) == 4
    assert [len(page.results) for page in pages] == [4] * 4
    assert len(set(found)) == 16
    again = calm.compose(ask(**asked, cursor=pages[0].next_cursor))
    assert [one["items"] for one in again.results] == [one["items"] for one in pages[1].results]
    with pytest.raises(BadRequest, match="another request"):
        calm.rank(ask(bundles=[["p0", "p6"]], cursor=pages[0].next_cursor))


def test_rejected_items_push_what_is_like_them_down(calm: Service) -> None:
    plain = ids(calm.complete(ask(items=["p0", "p6"], k=90)))
    first = plain[0]
    pushed = calm.complete(ask(items=["p0", "p6"], k=90, not_like=[first]))
    assert first not in ids(pushed)
    vectors = calm._deployments.releases()[0].base.state.known.frozen
    assert vectors is not None
    index = calm.dataset.catalog.index
    alike = vectors @ vectors[index[first]]
    nearest = max((item for item in plain if item != first), key=lambda item: alike[index[item]])
    assert ids(pushed).index(nearest) > plain.index(nearest) - 1
    assert any("not like" in one["shares"] for one in pushed.results)


# --- live items and events


def test_a_new_item_is_found_at_once_everywhere(shop: Shop) -> None:
    service = shop.open()
    new = {"item_id": "n1", "title": "w10 w29 w130", "category": "Shop > Bag", "slot": "bag", "price": 20.0,
           "brand": "Acme", "colour": "red"}  # fmt: skip
    outcomes = service.put_items([new, {"item_id": "n2"}, {"item_id": "n3", "title": "w12", "price": -1}])
    assert [one.status for one in outcomes] == ["created", "refused", "refused"]
    assert "needs a title" in (outcomes[1].error or "")
    assert ids(service.search(ask(query="w10 w29 w130", k=1))) == ["n1"]
    red = {"must": [{"column": "colour", "any": ["red"]}]}
    assert ids(service.complete(ask(items=["p0"], k=5, filter=red))) == ["n1"]
    assert ids(service.replace(ask(items=["p0", "p6", "p18"], swap="p18", k=5, filter=red))) == ["n1"]
    bundle = service.compose(ask(items=["p0"], k=1, size=2, filter=red)).results[0]
    assert set(bundle["items"]) == {"p0", "n1"}
    beside = service.complete(ask(items=["n1"], k=5))  # and others are found beside it
    assert (beside.origin.answered_by, len(beside.results)) == ("fusion", 5)
    assert service.get_item("n1")["fields"]["colour"] == "red"
    assert service.measure().upserted == 1

    assert service.put_items([{"item_id": "n1", "price": 99.0}])[0].status == "updated"
    cheap = {"must": [{"column": "colour", "any": ["red"]}, {"column": "price", "lt": 50}]}
    assert ids(service.complete(ask(items=["p0"], k=5, filter=cheap))) == []
    service.delete_item("n1")
    assert "n1" not in ids(service.complete(ask(items=["p0"], k=97)))
    with pytest.raises(UnknownItem, match="n1"):
        service.get_item("n1")


def test_a_new_item_is_scored_as_an_old_one_of_the_same_text_is(shop: Shop) -> None:
    """A twin of an item no bundle holds gets nearly its score; scorers that count speak of neither."""
    service = shop.open()
    base = service._deployments.releases()[0].base
    cold = int(np.argmin(base.state.known.support))
    catalog = base.dataset.catalog
    item = {"title": catalog.titles[cold], "category": " > ".join(catalog.categories[cold]),
            "slot": catalog.slots[cold]}  # fmt: skip
    service.put_items([{"item_id": "twin", **item}])
    answer = service.complete(ask(items=["p1"], k=97))
    scores = {one["item_id"]: one["score"] for one in answer.results}
    spread = np.std(list(scores.values()))
    assert abs(scores["twin"] - scores[catalog.item_ids[cold]]) < 1.5 * spread


def test_a_change_of_a_known_item_keeps_what_is_known_of_it(shop: Shop) -> None:
    service = shop.open()
    before = service.complete(ask(items=["p0"], k=95))
    [cheaper] = service.put_items([{"item_id": "p6", "price": 1.25, "stock": 0}])
    assert cheaper.note is None
    after = service.complete(ask(items=["p0"], k=95))
    assert ids(after) == ids(before)
    assert next(one for one in after.results if one["item_id"] == "p6")["price"] == 1.25
    assert "p6" not in ids(service.complete(ask(items=["p0"], k=95, in_stock=True)))
    release = service._deployments.releases()[0]
    words = replace(release.base.state.fusion, weights={**release.base.state.fusion.weights, PEER: {"always": 0.1}})
    for fusion, late in ((words, True), (replace(words, weights={FROZEN: {"always": 1.0}}, silence={}), False)):
        object.__setattr__(release.base.state, "fusion", fusion)
        told = service.put_items([{"item_id": "p6", "title": "w100 w101 w102"}, {"item_id": "fresh", "title": "w100"}])
        assert told[1].note is None, "what is new has no old text"
        assert (told[0].note or "").startswith("Its text has changed: CEASE-TFIDF") is late
    assert ids(service.search(ask(query="w100 w101 w102", k=1))) == ["p6"]
    service.delete_item("p6")
    assert "p6" not in ids(service.complete(ask(items=["p0"], k=95)))


def test_what_was_acknowledged_is_there_after_a_restart(shop: Shop) -> None:
    service = shop.open()
    service.put_items([{"item_id": "n1", "title": "w150 w151", "slot": "bag"}])
    service.add_events([{"user": "new", "item_id": "p0", "kind": "purchase"}])
    service.promote(ALIAS, "v2")
    service.close()
    again = shop.open()
    assert ids(again.search(ask(query="w150 w151", k=1))) == ["n1"]
    assert again.recommend(ask(user="new", k=3)).origin.answered_by == "fusion"
    assert again.list_adapters()[0].arms["prod"].version == "tiny@v2"
    assert again.rollback(ALIAS).arms["prod"].version == "tiny@v1"


def test_events_are_context_at_once_and_bar_what_was_taken_or_rejected(shop: Shop) -> None:
    service = shop.open()
    assert service.recommend(ask(user="new", k=3)).origin.answered_by == "popularity"
    count = service.add_events(
        [
            {"user": "new", "item_id": "p2", "kind": "view", "event_id": "e1"},
            {"user": "new", "item_id": "p8", "kind": "purchase"},
            {"user": "new", "item_id": "p14", "kind": "rejected"},
            {"user": "new", "item_id": "not yet", "kind": "view"},
        ]
    )
    assert count == 4
    assert service.add_events([{"user": "new", "item_id": "p2", "kind": "view", "event_id": "e1"}]) == 0
    answer = service.recommend(ask(user="new", k=95))
    assert answer.origin.answered_by == "fusion"
    assert not {"p8", "p14"} & set(ids(answer))
    styles = [int(item[1:]) % 6 for item in ids(answer)[:5]]
    assert styles.count(2) >= 3  # p2 and p8 are of style 2
    with pytest.raises(DataError, match=r'kind: expected.*Did you mean "view"'):
        service.add_events([{"user": "new", "item_id": "p2", "kind": "views"}])


def test_a_forgotten_user_is_nobody_any_more(shop: Shop) -> None:
    service = shop.open()
    service.add_events([{"user": "u3", "item_id": "p5", "kind": "purchase"}])
    assert service.recommend(ask(user="u3", k=3)).origin.answered_by == "fusion"
    assert service.forget_user("u3")["events"] == 1
    assert service.recommend(ask(user="u3", k=3)).origin.answered_by == "popularity"
    assert "u3" not in [one["user"] for one in service.list_examples()["users"]]
    service.close()
    assert shop.open().recommend(ask(user="u3", k=3)).origin.answered_by == "popularity"


def test_another_worker_sees_items_events_and_promotions(shop: Shop) -> None:
    one, other = shop.open(), shop.open()
    one.put_items([{"item_id": "n1", "title": "w150 w151", "slot": "bag"}])
    one.add_events([{"user": "new", "item_id": "p0", "kind": "purchase"}])
    one.promote(ALIAS, "v2")
    _wait(lambda: ids(other.search(ask(query="w150 w151", k=1))) == ["n1"])
    _wait(lambda: other.recommend(ask(user="new", k=1)).origin.answered_by == "fusion")
    _wait(lambda: other.complete(ask(items=["p0"])).origin.version == "tiny@v2")
    first, second = (service.complete(ask(items=["p0"], k=95)) for service in (one, other))
    assert first.origin == second.origin
    assert first.results == second.results


def _wait(done: Callable[[], bool], seconds: float = 20.0) -> None:
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if done():
            return
        waiting.wait(0.02)
    raise AssertionError("it did not happen")


# --- promotions


def test_a_broken_or_unknown_version_is_refused_and_the_old_one_stays(shop: Shop) -> None:
    service = shop.open()
    before = service.complete(ask(items=["p0"], k=20))
    weights = next((shop.store / "tiny" / "v2").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 255
    weights.chmod(0o644)
    weights.write_bytes(bytes(content))
    with pytest.raises(RefusedRelease, match="tiny@v2 is not taken into use"):
        service.promote(ALIAS, "v2")
    with pytest.raises(UnknownAdapter, match="v9"):
        service.promote(ALIAS, "v9")
    with pytest.raises(UnknownAdapter, match='Did you mean "tiny@prod"'):
        service.promote("tiny@prd", "v2")
    after = service.complete(ask(items=["p0"], k=20))
    assert (after.results, after.origin) == (before.results, before.origin)
    status = service.list_adapters()[0]
    assert status.job is not None
    assert status.job.state == "refused"
    assert service.measure().swaps[0].result == "refused"
    assert any("stays as it is" in note for note in shop.notes)
    # Named to be compared it is built in the background, once: from then on the reason is told, not "ask again".
    with pytest.raises(NotReady):
        service.complete(ask(items=["p0"], adapter="tiny@v2"))
    _wait(lambda: any("cannot be compared" in note for note in shop.notes))
    with pytest.raises(RefusedRelease, match="tiny@v2 is not taken into use"):
        service.complete(ask(items=["p0"], adapter="tiny@v2"))


def test_a_promotion_that_cannot_be_written_down_does_not_happen(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    service = shop.open()

    def fail(*args: object, **kwargs: object) -> None:
        raise StateError("The disk is full.")

    monkeypatch.setattr(service._state, "put_deployment", fail)
    with pytest.raises(RefusedRelease, match="disk is full"):
        service.promote(ALIAS, "v2")
    assert service.complete(ask(items=["p0"])).origin.version == "tiny@v1"
    assert AdapterStore(shop.store).alias_at(ALIAS).version == 1


def test_a_split_is_sticky_and_rolled_back_in_one_call(shop: Shop) -> None:
    service = shop.open()
    seen: list[ShownAnswer] = []
    service.on_answer(seen.append)
    service.promote(ALIAS, "tiny@v2", split={"prod": 70, "next": 30})
    arms = {
        user: {service.recommend(ask(user=user, items=["p0"], k=1)).origin.arm for _ in range(2)}
        for user in (f"s{number}" for number in range(150))
    }
    assert all(len(own) == 1 for own in arms.values())
    share = sum("next" in own for own in arms.values()) / len(arms)
    assert 0.15 < share < 0.45
    versions = {"prod": "tiny@v1", "next": "tiny@v2"}
    _wait(lambda: len(seen) == 300)
    assert all(one.answer.origin.version == versions[one.answer.origin.arm] for one in seen)
    status = service.list_adapters()[0]
    assert {name: arm.share for name, arm in status.arms.items()} == {"prod": 70.0, "next": 30.0}
    assert sum(arm.requests for arm in status.arms.values()) == 300
    assert AdapterStore(shop.store).alias_at(ALIAS).version == 1
    assert service.measure().swaps[0].result == "split"
    assert list(service.rollback(ALIAS).arms) == ["prod"]
    with pytest.raises(Conflict, match="nothing to go back to"):
        service.rollback(ALIAS)
    with pytest.raises(Conflict, match="add up to 100"):
        service.promote(ALIAS, "v2", split={"prod": 90, "next": 20})


def test_a_shadow_answers_unseen(shop: Shop) -> None:
    service = shop.open()
    seen: list[ShownAnswer] = []
    service.on_answer(seen.append)
    service.promote(ALIAS, "v2", shadow=True)
    answer = service.complete(ask(items=["p0"], k=3, request_id="r9"))
    assert (answer.origin.version, answer.origin.arm) == ("tiny@v1", "prod")
    _wait(lambda: len(seen) == 2)
    assert [(one.answer.request_id, one.answer.origin.arm, one.answer.origin.version) for one in seen] == [
        ("r9", "prod", "tiny@v1"), ("r9", "shadow", "tiny@v2"),
    ]  # fmt: skip


def test_a_cursor_of_another_release_has_expired(shop: Shop) -> None:
    service = shop.open()
    first = service.complete(ask(items=["p0"], k=20))
    service.promote(ALIAS, "v2")
    with pytest.raises(CursorExpired, match="without cursor"):
        service.complete(ask(items=["p0"], k=20, cursor=first.next_cursor))


def test_who_moves_an_alias(shop: Shop) -> None:
    store = AdapterStore(shop.store)
    watching = shop.open(follow="watch")
    store.alias("tiny@v2", "prod")
    _wait(lambda: watching.list_adapters()[0].arms["prod"].version == "tiny@v2")
    assert watching.rollback(ALIAS).arms["prod"].version == "tiny@v1"
    assert store.alias_at(ALIAS).version == 1
    watching.close()
    fixed = shop.open(follow="fixed")
    with pytest.raises(Conflict, match="fixed"):
        fixed.promote(ALIAS, "v2")


def test_another_alias_is_loaded_and_unloaded(shop: Shop) -> None:
    service = shop.open()
    with pytest.raises(UnknownAdapter, match="Served: tiny@prod"):
        service.complete(ask(items=["p0"], adapter="tiny@beta"))
    AdapterStore(shop.store).alias("tiny@v2", "beta")
    assert service.load("tiny@beta").arms["prod"].version == "tiny@v2"
    assert service.complete(ask(items=["p0"], adapter="tiny@beta")).origin.version == "tiny@v2"
    assert service.complete(ask(items=["p0"], adapter="tiny@v2")).origin.alias == "tiny@beta"
    assert service.complete(ask(items=["p0"])).origin.alias == ALIAS
    service.unload("tiny@beta")
    with pytest.raises(Conflict, match="only alias"):
        service.unload(ALIAS)
    with pytest.raises(NotReady, match="being built"):
        service.complete(ask(items=["p0"], adapter="frozen"))
    _wait(lambda: service._deployments._compared.find("frozen") is not None)
    assert service.complete(ask(items=["p0"], adapter="frozen")).origin.version == "frozen"


def test_a_release_that_nobody_holds_is_gone(shop: Shop) -> None:
    service = shop.open()
    gone = weakref.ref(service._deployments.releases()[0])
    service.promote(ALIAS, "v2")
    service.promote(ALIAS, "v1")  # it was kept for a rollback, and is used again
    assert service._deployments.releases()[0] is gone()
    service.promote(ALIAS, "frozen")
    service.promote(ALIAS, "v2")
    gc.collect()
    assert gone() is None


def test_answers_while_promotions_happen_are_of_one_release_each(shop: Shop) -> None:
    service = shop.open()
    alone = {}
    for version in ("v2", "v1"):
        service.promote(ALIAS, version)
        answer = service.complete(ask(items=["p0", "p6"], query="w10 w30", k=30))
        alone[answer.origin.release] = (answer.origin.digest, answer.results)
    assert len(alone) == 2
    stop = threading.Event()
    faults: list[str] = []
    counts = dict.fromkeys(alone, 0)

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                got = service.complete(ask(items=["p0", "p6"], query="w10 w30", k=30))
            except Exception as error:
                faults.append(repr(error))
                return
            digest, results = alone[got.origin.release]
            counts[got.origin.release] += 1
            if digest != got.origin.digest or not _same(results, got.results):
                faults.append(f"an answer of {got.origin.version} mixes releases")

    threads = [threading.Thread(target=keep_asking) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(50):
        service.promote(ALIAS, ("v2", "v1")[number % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert min(counts.values()) > 0


def test_a_worker_does_not_go_back_to_a_row_of_its_own_that_it_has_overtaken(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = shop.open()
    deployments = service._deployments
    read = deployments._state.deployments_since

    def promote_again() -> None:
        while True:
            try:
                service.promote(ALIAS, "v1")
                return
            except Conflict:  # the first one is not quite done
                time.sleep(0.01)

    overtaking = threading.Thread(target=promote_again)

    def overtake(seq: int = 0, limit: int | None = None) -> list[Any]:
        rows = read(seq, limit)
        if any(row.arms["prod"].version == "tiny@v2" for row in rows) and overtaking.ident is None:
            overtaking.start()
            overtaking.join(2)  # it has been shown by now, unless it waits for whoever reads
        return rows

    monkeypatch.setattr(deployments._state, "deployments_since", overtake)
    service.promote(ALIAS, "v2")
    _wait(lambda: len(deployments.swaps) >= 2)
    overtaking.join()
    time.sleep(0.2)
    _wait(lambda: not deployments._busy)
    assert [swap.after for swap in deployments.swaps] == ["tiny@v1", "tiny@v2"]


def test_what_another_worker_did_meanwhile_is_followed_once_the_alias_is_free(shop: Shop) -> None:
    service, other = shop.open(), shop.open()
    deployments = service._deployments
    deployments._require_free(ALIAS)
    other.promote(ALIAS, "v2")
    time.sleep(0.2)
    assert deployments._arms[ALIAS].prod.release.version == "tiny@v1"
    deployments._busy.discard(ALIAS)
    _wait(lambda: deployments._arms[ALIAS].prod.release.version == "tiny@v2")


def _same(expected: tuple[dict[str, Any], ...], found: tuple[dict[str, Any], ...]) -> bool:
    return [one["item_id"] for one in expected] == [one["item_id"] for one in found] and bool(
        np.allclose([one["score"] for one in expected], [one["score"] for one in found], atol=1e-5)
    )


def test_texts_by_themselves(calm: Service) -> None:
    vectors, origin = calm.embed(["w10 w30", "w12"], ALIAS)
    assert vectors.shape == (2, 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (origin.alias, origin.version) == (ALIAS, "tiny@v1")
    frozen, _ = calm.embed(["w10 w30"], "frozen")
    assert not np.allclose(frozen[0], vectors[0], atol=1e-4)
    matched, _ = calm.match("w10 w30", ["w50 w60", "w10 w30", "w99"], k=2)
    assert matched[0]["index"] == 1
    assert calm.tag(["red dress"])[0][0][0]["text"] == "dress"
    with pytest.raises(UnknownAdapter, match="intents"):
        calm.classify(["where is my parcel"], "intents")
    with pytest.raises(BadRequest, match="Text 1"):
        calm.embed(["w10", " "])
    assert calm.count_tokens(["w10 w30", "w12"]) == 7


def test_what_a_page_lists(calm: Service) -> None:
    found, cursor, count = calm.find_items("w130", limit=5)
    assert (len(found), count) == (5, 24)
    more, _, _ = calm.find_items("w130", limit=5, cursor=cursor)
    assert not {one["item_id"] for one in found} & {one["item_id"] for one in more}
    examples = calm.list_examples()
    assert [len(examples[name]) for name in ("users", "baskets", "queries")] == [6, 6, 6]
    versions = calm.list_versions()
    assert [(one["version"], one["loaded"]) for one in versions] == [("tiny@v2", False), ("tiny@v1", True)]
    assert versions[1]["aliases"] == [ALIAS]
    calm.complete(ask(items=["p0"]))
    figures = calm.measure()
    assert figures.catalogue == 96
    assert figures.answered_by["fusion"] > 0


def test_a_service_that_closes_takes_no_more(shop: Shop) -> None:
    service = shop.open()
    service.close()
    assert not service.ready
    with pytest.raises(NotReady, match="closing"):
        service.complete(ask(items=["p0"]))


def test_without_an_adapter_the_frozen_encoder_answers(shop: Shop) -> None:
    shutil.rmtree(shop.store)
    service = shop.open(adapters=())
    answer = service.complete(ask(items=["p0"]))
    assert (answer.origin.alias, answer.origin.version) == ("frozen", "frozen")
    assert any("No adapter of the category tiny" in note for note in shop.notes)


def test_what_was_bought_together_is_counted_without_fitting_anew(shop: Shop) -> None:
    service = shop.open()
    release = service._deployments.releases()[0]
    counting = {
        str(name): fitted for name, fitted in release.base.state.serving.items()
        if isinstance(fitted, FittedScorer) and isinstance(fitted.scorer, Popularity | CoOccurrence | ItemKNN | EASE)
        and type(fitted.scorer).__name__ != "CEASE"
    }  # fmt: skip
    rows = [len(fitted.scorer.support) and int(fitted.scorer.support.sum()) for fitted in counting.values()]
    for user in ("n1", "n2", "n3"):
        service.add_events([{"user": user, "item_id": item, "kind": "purchase"} for item in ("p0", "p1")])
    service.fold_events()
    served = service._deployments.find(None, "")[2].view.recommender.state.serving
    after = {str(name): fitted for name, fitted in served.items()}
    for (name, fitted), before in zip(counting.items(), rows, strict=True):
        assert int(after[name].scorer.support.sum()) == before + 6  # type: ignore[attr-defined]
        assert int(fitted.scorer.support.sum()) == before  # the release itself is as it was
    service.forget_user("n1")
    service.fold_events()
    again = service._deployments.find(None, "")[2].view.recommender.state.serving
    for name, before in zip(counting, rows, strict=True):
        one = {str(scorer): fitted for scorer, fitted in again.items()}[name]
        assert int(one.scorer.support.sum()) == before + 4  # type: ignore[attr-defined]


def test_candidates_found_first_give_the_answers_that_all_items_give(
    shop: Shop, calm: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where filters leave few, where items came later, and where purchases were counted since."""
    pytest.importorskip("faiss", reason="the optional package faiss is not installed")
    of_any_size = BundleRecommender.with_retrieval
    monkeypatch.setattr(BundleRecommender, "with_retrieval", lambda made: of_any_size(made, 1))
    service = shop.open()
    must = {"must": [{"column": "brand", "any": ["acme"]}]}
    for values in (
        {"items": ["p0", "p6"]},
        {"user": "u3"},
        {"items": ["p1"], "filter": must},
        {"items": ["p1"], "k": 90},
    ):
        asked = ask(**{"k": 5, **values})
        found, expected = service.complete(asked), calm.complete(asked)
        assert ids(found) == ids(expected)
        assert found.origin.answered_by == "fusion"
    # A later page is found in all there is.
    first = service.complete(ask(items=["p0"], k=5))
    second = service.complete(ask(items=["p0"], k=5, cursor=first.next_cursor))
    assert ids(first) + ids(second) == ids(calm.complete(ask(items=["p0"], k=10)))

    service.put_items([{"item_id": "n1", "title": "w10 w29 w130", "slot": "bag"}, {"item_id": "p8", "title": "w11"}])
    for user in ("n1", "n2", "n3"):
        service.add_events([{"user": user, "item_id": item, "kind": "purchase"} for item in ("p0", "p1", "p40")])
    service.fold_events()
    now = service._deployments.find(None, "")[2].view.recommender
    assert now.state.retrieval is not None
    for context in ([0], [0, 6, 18], [len(now.dataset.catalog) - 1]):
        (some,), whole = now.score_contexts([(np.array(context), None)], 5), now.score_context(np.array(context))
        scored = np.isfinite(some.scores)
        assert not some.whole
        assert scored.sum() >= 50
        np.testing.assert_allclose(some.scores[scored], whole.scores[scored], rtol=1e-3, atol=1e-3)


def test_drawn_lists_tell_how_probable_they_were(shop: Shop) -> None:
    service = shop.open(explore="plackett-luce:5")
    seen: list[ShownAnswer] = []
    service.on_answer(seen.append)
    first, again, other = (service.complete(ask(items=["p0", "p6"], k=5, request_id=name)) for name in ("a", "a", "b"))
    assert ids(first) == ids(again)
    assert ids(first) != ids(other)
    assert first.next_cursor is None  # what a next page would hold may be on this one
    assert len(set(ids(first))) == 5
    assert len(first.propensities) == 5
    assert all(0 < one < 1 for one in first.propensities)
    assert service.search(ask(query="dress", k=3)).propensities == ()
    deadline = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen[0].propensities == first.propensities
    with pytest.raises(PeftComboError, match="Expected epsilon-greedy:SHARE"):
        shop.open(explore="thompson")


def test_what_is_clicked_is_drawn_by_every_worker_until_who_clicked_is_forgotten(shop: Shop) -> None:
    services = [shop.open(explore="thompson:5") for _ in range(2)]
    state = State.open(shop.folder / "state")
    pool = ids(services[0].complete(ask(items=["p0", "p6"], k=200)))[:100]  # what lists are drawn from
    last, key = pool[-1], state.identify("somebody")
    shown = tuple(ShownItem(one, 0.1, 0.1) for one in pool)
    row = ExposureRow("", key, "complete", ALIAS, "tiny@v1", "d", "prod", ("p0",), shown)
    state.add_exposures([replace(row, request_id=f"r{n}") for n in range(40)])
    state.add_feedback([FeedbackRow(f"r{n}", "click", last) for n in range(36)])

    def share(service: Service, turn: str) -> float:
        asked = (ask(items=["p0", "p6"], k=3, request_id=f"{turn}{n}") for n in range(10))
        return float(np.mean([ids(service.complete(one))[0] == last for one in asked]))

    for place, service in enumerate(services):
        _wait(lambda service=service, place=place: share(service, f"{place} {time.monotonic()}") > 0.6, 1)  # type: ignore[misc]
    answer = services[0].complete(ask(items=["p0", "p6"], k=3))
    assert all(0 < one <= 1 for one in answer.propensities)
    assert len(answer.propensities) == 3
    services[1].forget_user("somebody")
    _wait(lambda: share(services[0], f"forgotten {time.monotonic()}") < 0.3, 1)
    state.close()
