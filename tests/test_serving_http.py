"""The service over HTTP: one shape for errors, keys with scopes, limits, and nothing of a person in a log."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scripted_engine import ScriptedEngine

from peft_combo.errors import PeftComboError
from peft_combo.serving.app import make_app, make_context
from peft_combo.serving.config import make_config
from peft_combo.serving.monitoring import METRICS
from peft_combo.serving.state import Scope, State

Client = Any
JSON = {"content-type": "application/json"}


class Shop:
    """A running service: `client` calls it, `key` makes keys for it."""

    def __init__(self, client: Client, engine: ScriptedEngine, state: State, context: Any) -> None:
        self.client, self.engine, self.state, self.context = client, engine, state, context

    def key(self, *scopes: Scope, name: str = "ops", per_minute: int | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.state.add_key(name, scopes, per_minute)}"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    """Start services with settings of their own."""
    from starlette.testclient import TestClient

    clients = []

    def call(**settings: Any) -> Shop:
        state = State.open(tmp_path / "state")
        engine = ScriptedEngine(state)
        config = make_config({"recipe": "lora-fashion", "state": str(tmp_path / "state"), **settings})
        context = make_context(config, engine, state)  # type: ignore[arg-type]
        client = TestClient(make_app(context), base_url="http://127.0.0.1:8765")
        clients.append(client)
        client.__enter__()
        return Shop(client, engine, state, context)

    yield call
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def shop(start: Callable[..., Shop]) -> Shop:
    return start()


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:peft-combo:problem:{kind}"
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


@pytest.mark.parametrize("route", ["recommend", "complete", "compose", "replace", "search", "rank"])
def test_every_answer_tells_its_origin_in_body_and_headers(shop: Shop, route: str) -> None:
    answer = shop.client.post(f"/v1/{route}", json={"items": ["F1"], "k": 2}, headers={"X-Request-Id": "mine-1"})
    body = answer.json()
    assert list(body) == ["request_id", "results", "next_cursor", "took_ms", "origin", "notes"]
    assert body["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert body["origin"]["version"] == answer.headers["x-adapter-version"] == "fashion@v1"
    assert body["origin"]["digest"] == answer.headers["x-adapter-digest"]
    assert (answer.headers["x-answered-by"], answer.headers["x-arm"]) == ("fusion", "prod")
    assert answer.headers["server-timing"] == "score;dur=0.50, total;dur=1.00"
    assert body["results"][0]["odd"] is None  # JSON has no word for NaN


def test_the_body_names_the_request_before_the_header(shop: Shop) -> None:
    answer = shop.client.post("/v1/complete", json={"request_id": "Anfrage ü"}, headers={"X-Request-Id": "mine"})
    assert answer.json()["request_id"] == "Anfrage ü"
    assert answer.headers["x-request-id"] == "Anfrage %C3%BC"
    strange = shop.client.post("/v1/complete", json={}, headers={"X-Request-Id": "a b\tc"})
    assert re.fullmatch("[0-9a-f]{32}", strange.json()["request_id"])


@pytest.mark.parametrize(
    ("send", "status", "kind", "hint"),
    [
        (("POST", "/v1/complete", {"item": ["F1"]}), 422, "invalid-body", "items"),
        (("POST", "/v1/complete", {"k": "two"}), 422, "invalid-body", None),
        (("POST", "/v1/complete", {"k": 100_000}), 422, "invalid-body", None),
        (("POST", "/v1/complete", {"items": ["F11"]}), 404, "unknown-item", "F1"),
        (("POST", "/v1/complete", [1]), 422, "invalid-body", None),
        (("POST", "/v1/complet", {}), 404, "not-found", "/v1/complete"),
        (("GET", "/v1/complete", None), 405, "method-not-allowed", None),
        (("GET", "/v1/items?limit=many", None), 422, "invalid-body", None),
        (("POST", "/v1/complete", {"user": "boom"}), 500, "fault", None),
        (("POST", "/v1/embeddings", {"input": "a", "model": "fashion@prd"}), 404, "unknown-adapter", "fashion@prod"),
        (("POST", "/v1/embeddings", {"input": "a", "dimensions": 7}), 400, "bad-request", None),
        (("POST", "/v1/embeddings", {"input": [[1, 2]]}), 422, "invalid-body", None),
        (("PUT", "/v1/items/x", {"title": ""}), 400, "bad-request", None),
        (("GET", "/v1/adapters/fashion@prd", None), 404, "unknown-adapter", "fashion@prod"),
        (("POST", "/v1/feedback", {"request_id": "nobody", "kind": "click"}), 404, "unknown-request", None),
        (("POST", "/v1/events", {"events": [{"user": "u", "item_id": "F1", "kind": "x"}]}), 422, "invalid-body", None),
        (("GET", "/page/..%2f..%2fapp.py", None), 404, "not-found", None),
    ],
)  # fmt: skip
def test_every_error_is_a_problem_with_the_nearest_name(
    shop: Shop, send: tuple[str, str, Any], status: int, kind: str, hint: str | None
) -> None:
    method, path, body = send
    told = problem(shop.client.request(method, path, json=body), status, kind)
    assert told.get("did_you_mean") == hint


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b'{"items": ["\\ud800"]}', b'{"k": 1e999}', b"[" * 5000, b"", b"null"]
)
def test_a_malformed_body_is_a_problem(shop: Shop, body: bytes) -> None:
    problem(shop.client.post("/v1/complete", content=body, headers=JSON), 422, "invalid-body")


def test_bodies_of_another_kind_or_too_large_are_refused(start: Callable[..., Shop]) -> None:
    shop = start(body_bytes=1024)
    problem(shop.client.post("/v1/complete", content=b"{}"), 415, "unsupported-media-type")
    large = b"{" + b" " * 2000 + b"}"
    problem(shop.client.post("/v1/complete", content=large, headers=JSON), 413, "too-large")
    parts = iter([large[:500], large[500:1500], large[1500:]])  # sent without saying how long it is
    problem(shop.client.post("/v1/complete", content=parts, headers=JSON), 413, "too-large")


def test_the_examples_of_the_description_can_be_sent_as_they_stand(shop: Shop) -> None:
    document = shop.client.get("/openapi.json").json()
    sent = 0
    for path, verbs in document["paths"].items():
        for method, operation in verbs.items():
            for kind, media in operation.get("requestBody", {}).get("content", {}).items():
                for example in media.get("examples", {}).values():
                    value = example["value"]
                    content = value if isinstance(value, str) else json.dumps(value)
                    answer = shop.client.request(
                        method, path.replace("{item_id}", "new-2"), content=content, headers={"content-type": kind}
                    )
                    assert answer.status_code in (200, 201), f"{path}: {answer.text}"
                    sent += 1
    assert sent >= 12
    assert all(operation["summary"] for verbs in document["paths"].values() for operation in verbs.values())


def test_embeddings_are_openais(shop: Shop) -> None:
    asked = {"input": ["a b", "c"], "model": "fashion@prod", "encoding_format": "float", "user": "x"}
    numbers = shop.client.post("/v1/embeddings", json=asked).json()
    assert (numbers["object"], numbers["model"], numbers["usage"]["total_tokens"]) == ("list", "fashion@prod", 7)
    assert [one["index"] for one in numbers["data"]] == [0, 1]
    packed = shop.client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert vector.tolist() == numbers["data"][0]["embedding"]
    assert [one["id"] for one in shop.client.get("/v1/models").json()["data"]] == ["fashion@prod"]


def test_a_batch_takes_what_is_good_and_says_what_is_not(shop: Shop) -> None:
    lines = [
        '{"item_id": "n1", "title": "Hat", "colour": "red"}',
        "",
        '{"title": "x"}',
        "nonsense",
        '{"item_id": "n2"}',
    ]
    answer = shop.client.post(
        "/v1/items:batch", content="\n".join(lines), headers={"content-type": "application/x-ndjson"}
    )
    body = answer.json()
    assert body["accepted"] == 1
    assert [one["line"] for one in body["errors"]] == [3, 4, 5]
    assert shop.client.get("/v1/items/n1").json()["colour"] == "red"
    assert shop.client.put("/v1/items/a/b", json={"title": "Bag"}).status_code == 201
    assert shop.client.delete("/v1/items/a/b").json()["accepted"] == 1
    assert [row.deleted for row in shop.state.items_since()] == [False, True]


def test_feedback_finds_an_answer_that_was_just_given(shop: Shop) -> None:
    given = shop.client.post("/v1/complete", json={"items": ["F1"], "user": "u1"}).json()
    answer = shop.client.post(
        "/v1/feedback", json={"request_id": given["request_id"], "kind": "click", "item_id": "F2"}
    )
    assert answer.json()["accepted"] == 1
    [exposure] = shop.state.find_exposures(given["request_id"])
    assert exposure.user_key == shop.state.identify("u1")
    assert [one.item_id for one in exposure.shown] == [one["item_id"] for one in given["results"]]
    metrics = shop.client.get("/metrics").text
    assert 'peft_combo_feedback_total{alias="fashion@prod",arm="prod",kind="click"} 1.0' in metrics


def test_keys_open_what_their_scopes_say(start: Callable[..., Shop]) -> None:
    shop = start(open=[])
    ask, move = (
        ("/v1/complete", {"items": ["F1"]}),
        ("/v1/adapters/promote", {"alias": "fashion@prod", "version": "fashion@v2"}),
    )
    problem(shop.client.post(ask[0], json=ask[1]), 401, "unauthorized")
    reader, admin = shop.key("read", name="web"), shop.key("admin", name="ops")
    assert shop.client.post(ask[0], json=ask[1], headers=reader).status_code == 200
    problem(shop.client.post(move[0], json=move[1], headers=reader), 403, "forbidden")
    problem(shop.client.post(ask[0], json=ask[1], headers=admin), 403, "forbidden")
    assert shop.client.post(move[0], json=move[1], headers=admin).status_code == 200
    assert shop.engine.actors[-1].startswith("ops (")
    assert [row.actor.partition(" ")[0] for row in shop.state.audit_log() if row.action == "promote"] == ["ops"]
    for wrong in ("Bearer x", "Bearer " + reader["Authorization"][7:-1] + "_", "Basic abc"):
        problem(shop.client.post(ask[0], json=ask[1], headers={"Authorization": wrong}), 401, "unauthorized")
    for path in ("/health/live", "/health/ready", "/"):
        assert shop.client.get(path).status_code != 401


def test_moving_adapters_needs_a_key_even_where_the_rest_is_open(shop: Shop) -> None:
    body = {"alias": "fashion@prod", "version": "fashion@v2"}
    problem(shop.client.post("/v1/adapters/promote", json=body), 401, "unauthorized")
    problem(shop.client.delete("/v1/users/u1"), 401, "unauthorized")
    refused = shop.client.post(
        "/v1/adapters/promote", json={**body, "version": "fashion@v9"}, headers=shop.key("admin")
    )
    problem(refused, 409, "conflict")


def test_a_key_may_call_so_often_and_then_has_to_wait(shop: Shop) -> None:
    key = shop.key("read", per_minute=60)  # six at once
    codes = [shop.client.post("/v1/complete", json={}, headers=key) for _ in range(8)]
    assert [one.status_code for one in codes[:6]] == [200] * 6
    problem(codes[-1], 429, "rate-limited")
    assert int(codes[-1].headers["retry-after"]) >= 1


def test_a_full_queue_says_when_to_come_back_and_a_slow_answer_is_cut_off(start: Callable[..., Shop]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shop = start(threads=1, queue=2, timeout=0.3)
    answer = shop.client.post("/v1/complete", json={"user": "full"})
    problem(answer, 429, "overloaded")
    assert answer.headers["retry-after"] == "3"
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: shop.client.post("/v1/complete", json={"user": "slow"}).status_code, range(4)))
    assert sorted(set(codes)) == [429, 504]
    assert 'peft_combo_rejected_total{reason="overloaded"}' in shop.client.get("/metrics").text


def test_a_page_of_another_name_cannot_call_a_service_on_loopback(start: Callable[..., Shop]) -> None:
    shop = start(hosts=["shop.test"])
    problem(shop.client.post("/v1/complete", json={}, headers={"Host": "evil.test"}), 421, "misdirected")
    for host in ("localhost:8765", "127.0.0.1", "[::1]:8765", "shop.test"):
        assert shop.client.post("/v1/complete", json={}, headers={"Host": host}).status_code == 200


def test_metrics_count_errors_too_and_have_the_names_that_are_listed(shop: Shop) -> None:
    for body in ({"items": ["F1"]}, {"user": "boom"}, {"item": 1}):
        shop.client.post("/v1/complete", json=body)
    shop.client.get("/nowhere")
    text = shop.client.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    assert names <= set(METRICS)
    for code in ("200", "500", "422"):
        category = "fashion" if code == "200" else ""
        line = f'peft_combo_request_seconds_count{{category="{category}",code="{code}",route="/v1/complete"}} 1.0'
        assert line in text
    assert 'route="unknown"' in text  # never the path as it was called
    assert "/nowhere" not in text
    assert 'peft_combo_quality{metric="ndcg@10",split="after",version="fashion@v1"} 0.5' in text
    assert "peft_combo_encode_texts_total 10.0" in text
    status = shop.client.get("/v1/status").json()
    [route] = [one for one in status["routes"] if one["route"] == "/v1/complete"]
    assert (route["count"], route["errors"]) == (3, 2)
    assert 0 < route["p50_ms"] <= route["p99_ms"]


def test_a_person_is_forgotten_and_stands_in_no_file_and_no_log(
    start: Callable[..., Shop], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shop = start(access_log=True)
    user = "customer-4711-jane"
    shop.client.post("/v1/events", json={"events": [{"user": user, "item_id": "F1", "kind": "view"}]})
    given = shop.client.post("/v1/complete", json={"items": ["F1"], "user": user}).json()
    shop.client.post("/v1/feedback", json={"request_id": given["request_id"], "kind": "click"})
    shop.client.post("/v1/complete", json={"user": "boom"})
    key = shop.key("admin")
    answer = shop.client.delete(f"/v1/users/{user}", headers=key)
    assert answer.json()["removed"] == {"feedback": 1, "exposures": 1, "events": 1}
    assert shop.state.events_of(shop.state.identify(user)) == []
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"state.db", "secret"}
    for file in files:
        assert user.encode() not in file.read_bytes()
        assert key["Authorization"][7:].rpartition("_")[2].encode() not in file.read_bytes()
    out, err = capfd.readouterr()
    assert "DELETE /v1/users/{user} 200" in err
    assert "ValueError in /v1/complete" in err
    for word in (user, "boom is a secret", key["Authorization"][7:]):
        assert word not in out + err


def test_what_is_under_way_is_answered_before_the_service_ends(start: Callable[..., Shop]) -> None:
    shop = start()
    shop.client.post("/v1/complete", json={"items": ["F1"], "request_id": "last"})
    shop.client.__exit__(None, None, None)
    state = State.open(shop.context.config.state)
    assert [row.request_id for row in state.exposures_since()] == ["last"]  # the journal was written to its end
    state.close()
    assert not shop.engine.ready
    shop.client.__exit__ = lambda *_: None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "--workers"),
        ({"tls_cert": "a.pem"}, "--tls-cert FILE and --tls-key FILE go together"),
        ({"follow": "sometimes"}, "--follow"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PeftComboError, match=re.escape(words)):
        make_config({"recipe": "lora-fashion", **settings})


def test_only_loopback_is_open_by_itself() -> None:
    assert make_config({"recipe": "r"}).open_scopes == {"read", "write"}
    assert make_config({"recipe": "r", "host": "::1"}).open_scopes == {"read", "write"}
    assert make_config({"recipe": "r", "host": "0.0.0.0"}).open_scopes == set()


def test_a_connection_too_many_is_told_in_the_same_form(start: Callable[..., Shop]) -> None:
    import socket
    import threading

    from peft_combo.serving.connections import bind, make_server

    shop = start()
    config = make_config({"recipe": "lora-fashion", "port": 0, "connections": 3})
    bound, started = bind(config), threading.Event()
    server = make_server(make_app(shop.context), config, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    assert started.wait(30)
    held = [socket.create_connection(bound.getsockname()) for _ in range(3)]
    url = f"http://127.0.0.1:{bound.getsockname()[1]}/health/live"
    found = httpx.get(url)
    assert (found.status_code, found.headers["content-type"]) == (503, "application/problem+json")
    assert found.headers["retry-after"] == "1"
    assert found.json()["type"] == "urn:peft-combo:problem:overloaded"
    for one in held:
        one.close()
    for _ in range(100):
        if (again := httpx.get(url)).status_code == 200:
            break
    assert again.status_code == 200
    server.should_exit = True
    thread.join(30)
