"""The page in a real browser: what a shop person does with it, in two languages, without a word on the console.

Needs Debian's chromium. `PEFT_COMBO_SCREENSHOTS` names a folder to keep pictures in.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from served_shop import Served

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAGE = REPOSITORY / "peft_combo" / "serving" / "page"
SCRIPT = (PAGE / "app.js").read_text()
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not on this machine (Debian: chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass(frozen=True)
class RunningShop:
    """A service that runs: its address, and a key with every scope."""

    url: str
    admin_key: str


@pytest.fixture(scope="module")
def running(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningShop]:
    """The made-up shop, served from this process on a free port of loopback, over a store of its own."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from peft_combo.serving.app import make_app, make_context
    from peft_combo.serving.config import make_config
    from peft_combo.serving.connections import bind, make_server
    from peft_combo.serving.service import Service
    from peft_combo.serving.state import State

    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(served.store, folder / "adapters")
    config = make_config(served.settings(folder / "state", store=folder / "adapters", port=0))
    state = State.open(config.state)
    context = make_context(config, Service.open(config, state, lambda note: None), state)
    key = state.add_key("boss", frozenset({"read", "write", "admin"}))
    bound, started = bind(config), threading.Event()
    server = make_server(make_app(context), config, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    with bound:
        thread.start()
        assert started.wait(30), "the server did not start"
        yield RunningShop(f"http://127.0.0.1:{bound.getsockname()[1]}", key)
        server.should_exit = True
        thread.join(30)


class Visit:
    """One visit to the page, with what the console said and what was asked of whom."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.url = url
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.set_default_timeout(5000)
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^\w+://([^:/]*).*", r"\1", request.url)))
        self.open("")

    def open(self, view: str) -> None:
        self.page.goto(f"{self.url}/{view}")

    def bundles(self) -> list[list[str]]:
        """Return the ids of what is added, by bundle, once the answer is there."""
        self.page.wait_for_selector("#answer:not([aria-busy]) .card")
        return self.page.evaluate(
            "[...document.querySelectorAll('#answer .card')].map(card => "
            "[...card.querySelectorAll('.item')].map(item => item.dataset.item))"
        )

    def ids(self, place: str) -> list[str]:
        return self.page.evaluate(f"[...document.querySelectorAll('#{place} li')].map(item => item.dataset.item)")

    def act(self, what: Callable[[], Any], route: str) -> None:
        """Do something and wait until the answer of a route is drawn."""
        with self.page.expect_response(lambda response: response.url.endswith(route)):
            what()
        self.page.wait_for_selector("#answer:not([aria-busy])")

    def expect_refusals(self) -> None:
        """Take back what the browser itself says of answers of 4xx and 5xx, and of connections that fail."""
        self.complaints = [one for one in self.complaints if not one.startswith("Failed to load resource")]

    def picture(self, name: str) -> None:
        if folder := os.environ.get("PEFT_COMBO_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def visit(browser: Any, running: RunningShop) -> Iterator[Callable[..., Visit]]:
    """Visit the page; at the end no visit had a complaint or asked anybody but the service."""
    visits: list[Visit] = []
    contexts: list[Any] = []

    def start(**options: Any) -> Visit:
        contexts.append(browser.new_context(**{"viewport": WIDE, "locale": "en-GB", **options}))
        visits.append(Visit(contexts[-1], running.url))
        return visits[-1]

    yield start
    for context in contexts:
        context.close()
    assert [one for seen in visits for one in seen.complaints] == []
    assert set().union(*(seen.hosts for seen in visits)) <= {"127.0.0.1"}


def test_a_basket_changes_its_bundles_and_what_is_excluded_stays_away(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    before, basket = seen.bundles(), seen.ids("basket")
    assert basket, "an example is there from the start"
    assert page.locator("#answer .card .why").first.inner_text()
    assert re.search(r"Text \d+%.*Behaviour \d+%.*Rules \d+%", page.locator(".legend").first.inner_text(), re.DOTALL)
    added = before[0][0]
    add = page.locator(f".item[data-item={added}] button").first
    seen.act(add.click, "/v1/compose")
    assert seen.ids("basket") == [*basket, added]
    after = seen.bundles()
    assert after != before
    assert added not in {one for bundle in after for one in bundle}, "what is in the basket is not offered again"
    unwanted = after[0][0]
    seen.act(page.locator(f".item[data-item={unwanted}] button").nth(2).click, "/v1/compose")
    assert unwanted not in {one for bundle in seen.bundles() for one in bundle}
    assert seen.ids("excluded") == [unwanted]
    seen.act(page.locator("#excluded button").click, "/v1/compose")
    assert seen.bundles() == after
    seen.picture("bundles-1280")


def test_one_item_is_swapped_and_the_rest_of_the_bundle_stays(visit: Callable[..., Visit]) -> None:
    seen = visit()
    before = seen.bundles()
    card = seen.page.locator("#answer .card").first
    price = card.locator(".sum").inner_text()
    swap = card.locator(".item").first.locator("button").nth(1)
    swap.click()
    card.locator(".swaps li").first.wait_for()
    assert swap.get_attribute("aria-expanded") == "true"
    seen.picture("swap-1280")
    card.locator(".swaps li button").first.click()
    after = seen.bundles()
    assert after[0][0] != before[0][0]
    assert after[0][1:] == before[0][1:]
    assert after[1:] == before[1:]
    card.get_by_role("button", name="Undo the swap").click()
    assert seen.bundles() == before
    assert card.locator(".sum").inner_text() == price


def test_a_budget_holds_and_one_that_is_too_small_can_be_lifted(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.bundles()
    dearest = max(float(one.replace(",", "")) for one in page.locator(".sum").all_inner_texts())

    def move(step: int) -> None:
        page.locator("#budget").fill(str(step))

    seen.act(lambda: move(70), "/v1/compose")
    budget = float(page.locator("#budget-value").inner_text().replace(",", ""))
    assert budget < dearest
    sums = [float(one.split()[0].replace(",", "")) for one in page.locator(".sum").all_inner_texts()]
    assert sums
    assert max(sums) <= budget
    seen.act(lambda: move(0), "/v1/compose")
    lift = page.get_by_role("button", name="Lift the budget")
    seen.act(lift.click, "/v1/compose")
    assert page.locator("#budget-value").inner_text() == "no limit"
    assert seen.bundles()
    seen.expect_refusals()


def test_customers_and_words_start_bundles_too(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.bundles()
    for mode in ("user", "query"):
        page.locator(f"[name=mode][value={mode}]").check(force=True)
        seen.act(page.locator("#examples button").first.click, "/v1/compose")
        assert page.locator(f"#{mode}").input_value()
        assert seen.bundles()
    page.get_by_role("button", name="Start over").click()
    page.get_by_text("Put something into the basket").wait_for()


def test_both_languages_say_the_same_and_the_choice_is_remembered(visit: Callable[..., Visit]) -> None:
    english, chinese = (set(re.findall(r'"([\w. ]+)": "', part)) for part in SCRIPT.split("  zh: {")[:2])
    assert english == set(re.findall(r'"([\w. ]+)": "', SCRIPT.split("  zh: {")[1].split("\n};")[0])), chinese
    seen = visit(locale="zh-CN", color_scheme="dark")
    seen.bundles()
    assert seen.page.locator("h1").first.inner_text() == "适合搭配的组合"
    seen.picture("bundles-1280-chinese-dark")
    seen.act(seen.page.locator("#language").click, "/v1/compose")
    assert seen.page.locator("h1").first.inner_text() == "Bundles that go together"
    seen.open("")
    seen.bundles()
    assert seen.page.locator("html").get_attribute("lang") == "en"


def read_marks(seen: Visit) -> list[list[Any]]:
    """Return for each card of a comparison whether another rank is told, and the ids of items that are marked."""
    return seen.page.evaluate(
        "[...document.querySelectorAll('#answer .card')].map(card => [card.querySelectorAll('.tag.moved').length, "
        "...[...card.querySelectorAll('.item .tag[class*=only]')].map(tag => tag.closest('.item').dataset.item)])"
    )


def expect_marks(bundles: list[list[str]]) -> list[list[Any]]:
    """Work out what `read_marks` has to be from the bundles of both sides, in turn."""
    sides = [[set(one) for one in bundles[side::2]] for side in (0, 1)]
    expected: list[list[Any]] = []
    for place, mine in enumerate(bundles):
        rank, others = place // 2, sides[1 - place % 2]
        twin = others.index(set(mine)) if set(mine) in others else None
        lacks = [one for one in mine if one not in others[rank]] if twin is None else []
        expected.append([int(twin not in (None, rank)), *lacks])
    return expected


def test_two_versions_are_compared_and_every_difference_is_marked(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.bundles()
    seen.act(page.locator("#compare").check, "/v1/compose")
    page.wait_for_selector("#verdict", timeout=60_000)
    shown = [page.locator(f"#side-{side}").input_value() for side in "ab"]
    assert shown[0] != shown[1]
    assert all(name in told for name, told in zip(shown, page.locator(".origin").all_inner_texts(), strict=True))
    differed = False
    for mode in ("basket", "user", "query"):  # versions that differ by a few steps agree on many baskets
        page.locator(f"[name=mode][value={mode}]").check(force=True)
        for example in page.locator("#examples button").all():
            seen.act(example.click, "/v1/compose")
            marks = read_marks(seen)
            assert marks == expect_marks(seen.bundles())
            assert page.locator("#verdict").inner_text().startswith("Both") == all(one == [0] for one in marks)
            differed = differed or any(one != [0] for one in marks)
    assert differed
    seen.picture("compare-1280")
    seen.expect_refusals()  # the other version is built when it is first asked for


def test_adapters_move_with_the_admin_key_and_only_with_it(visit: Callable[..., Visit], running: RunningShop) -> None:
    seen = visit()
    page = seen.page
    seen.open("#adapters")
    card = page.locator("[data-alias]").first
    before = card.locator(".arm strong").first.inner_text()

    def change(name: str) -> None:
        card.get_by_role("button", name=name).click()
        assert before in page.locator("#confirm-text").inner_text() or name == "Roll back"
        with page.expect_response(lambda response: response.request.method == "POST"):
            page.locator("#confirm-yes").click()

    change("Promote")
    page.locator("#adapters-notice .failed").wait_for()
    assert "key" in page.locator("#adapters-notice").inner_text()
    assert card.locator(".arm strong").first.inner_text() == before
    page.locator("#key").fill(running.admin_key)
    page.get_by_role("button", name="Use key").click()
    page.get_by_text("A key is in use").wait_for()
    change("Promote")
    page.locator("#adapters-notice .verdict").wait_for()
    assert card.locator(".arm strong").first.inner_text() != before
    seen.picture("adapters-1280")
    change("Roll back")
    page.get_by_text("was rolled back").wait_for()
    assert card.locator(".arm strong").first.inner_text() == before
    card.get_by_label("Share of users").select_option("10")
    change("Promote")
    page.get_by_text("now answers 10% of the users").wait_for()
    assert card.locator(".arm .number").all_inner_texts() == ["90%", "10%"]
    change("Roll back")
    page.get_by_text("was rolled back").wait_for()
    assert card.locator(".arm").count() == 1
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert running.admin_key not in stored
    assert page.locator("tbody tr").count() >= 2
    seen.expect_refusals()


def test_health_is_drawn_from_what_the_service_counted(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.bundles()
    seen.page.locator(".tabs a").nth(2).click()
    seen.page.locator(".tiles").wait_for()
    requests = seen.page.locator(".figure dd").first.inner_text()
    assert int(requests.replace(",", "")) >= 1
    assert seen.page.locator(".latency .mono", has_text="/v1/compose").count() == 1
    fallbacks = seen.page.locator(".figure", has_text="Fallbacks").locator("dd").inner_text()
    assert re.match(r"\d+\.\d%", fallbacks), "counted, not guessed"
    seen.picture("health-1280")


def test_what_goes_wrong_is_said_in_words_and_can_be_tried_again(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.bundles()
    page.route("**/v1/compose", lambda route: route.abort())
    add = page.locator(".item button").first
    add.click()
    page.get_by_role("heading", name="The service does not answer").wait_for()
    page.unroute("**/v1/compose")
    overload = {"title": "Too many requests at once", "detail": "The queue is full.", "status": 429, "request_id": "r7"}
    page.route("**/v1/compose", lambda route: route.fulfill(status=429, json=overload, headers={"Retry-After": "3"}))
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("Try again in 3 s").wait_for()
    assert "r7" in page.locator(".failed").inner_text()
    seen.picture("error-1280")
    page.unroute("**/v1/compose")
    seen.act(page.get_by_role("button", name="Try again").click, "/v1/compose")
    assert seen.bundles()
    seen.expect_refusals()


def test_what_a_catalogue_says_is_text_and_never_markup(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.bundles()
    evil = '<img src=x onerror="document.title=1">'
    answer = {"results": [{"item_id": "x", "title": evil, "slot": evil, "price": 1.0}], "next_cursor": None, "total": 1}
    seen.page.route("**/v1/items?*", lambda route: route.fulfill(json=answer))
    seen.page.locator("#item-search").type("img")
    option = seen.page.locator("#item-options [role=option]")
    option.wait_for()
    assert evil in option.inner_text()
    assert seen.page.title() == "peft-combo"
    assert "innerHTML" not in SCRIPT
    assert not re.search(r"insertAdjacentHTML|document\.write|\beval\(|style=", SCRIPT)
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|<script>|<style", html)
    for text in (SCRIPT, html, (PAGE / "style.css").read_text()):
        assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_the_keyboard_alone_is_enough(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.bundles()
    basket = seen.ids("basket")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#item-search").focus()
    page.keyboard.type("w")
    page.locator("#item-options [role=option]").first.wait_for()
    page.keyboard.press("ArrowDown")
    assert page.locator("#item-search").get_attribute("aria-activedescendant") == "item-option-0"
    seen.act(lambda: page.keyboard.press("Enter"), "/v1/compose")
    assert len(seen.ids("basket")) == len(basket) + 1
    assert page.locator("#item-search").get_attribute("aria-expanded") == "false"
    exclude = page.locator(".item button").nth(2)
    exclude.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    seen.act(lambda: page.keyboard.press("Enter"), "/v1/compose")
    assert page.evaluate("document.activeElement.id") == "bundles-title", "the keyboard does not lose its place"
    assert page.locator("#live").inner_text()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('main button, main input, main select, main textarea')].filter(one => "
        "!(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim())).length"
    )
    assert unnamed == 0


def test_nothing_is_wider_than_a_telephone(visit: Callable[..., Visit]) -> None:
    seen = visit(viewport=NARROW)
    seen.bundles()
    for view, ready in (("bundles", "#answer .card"), ("adapters", "[data-alias]"), ("health", ".tiles")):
        seen.open(f"#{view}")
        seen.page.locator(ready).first.wait_for()
        assert seen.page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
        seen.picture(f"{view}-390")
    seen.open("#bundles")
    seen.act(seen.page.locator("#compare").check, "/v1/compose")
    seen.page.wait_for_selector("#verdict", timeout=30_000)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    seen.expect_refusals()
