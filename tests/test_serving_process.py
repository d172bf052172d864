"""The service as it is used: a real engine behind HTTP, and workers that are killed and started anew."""

from __future__ import annotations

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import REPOSITORY
from served_shop import Served, run_service

from peft_combo.serving.app import make_app, make_context
from peft_combo.serving.config import make_config
from peft_combo.serving.service import Service
from peft_combo.serving.state import State

USER = "u7"
WORKER = Path(__file__).parent / "scripted_worker.py"


@contextmanager
def serve(served: Served, folder: Path, **more: Any) -> Iterator[Any]:
    """Give a client of a real engine, all scopes open, and its state."""
    from starlette.testclient import TestClient

    config = make_config(served.settings(folder / "state", open=["read", "write", "admin"], **more))
    state = State.open(config.state)
    service = Service.open(config, state, lambda note: None)
    with TestClient(make_app(make_context(config, service, state)), base_url="http://127.0.0.1") as client:
        client.state_folder = folder / "state"
        client.store = state
        yield client


@pytest.fixture(scope="module")
def shop(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serve(served, tmp_path_factory.mktemp("served-state")) as client:
        yield client


def post(client: Any, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_every_example_of_the_description_is_answered(shop: Any) -> None:
    import json

    document = shop.get("/openapi.json").json()
    sent = 0
    for path, verbs in document["paths"].items():
        for method, operation in verbs.items():
            for kind, media in operation.get("requestBody", {}).get("content", {}).items():
                for name, example in media.get("examples", {}).items():
                    value = example["value"]
                    content = value if isinstance(value, str) else json.dumps(value)
                    place = path.replace("{item_id}", "example-item")
                    answer = shop.request(method, place, content=content, headers={"content-type": kind})
                    assert answer.status_code in (200, 201), f"{path} {name}: {answer.text}"
                    sent += 1
    assert sent >= 12


def test_an_item_is_found_by_its_words_as_soon_as_it_is_put(shop: Any) -> None:
    assert shop.put("/v1/items/cold-1", json={"title": "w10 w199", "slot": "bag", "price": 5.0}).status_code == 201
    found = post(shop, "/v1/search", query="w10 w199", k=3)
    assert "cold-1" in [one["item_id"] for one in found["results"]]
    assert shop.delete("/v1/items/cold-1").status_code == 200
    assert "cold-1" not in [one["item_id"] for one in post(shop, "/v1/search", query="w10 w199", k=3)["results"]]


def test_hard_rules_of_the_data_hold_over_http_for_items_put_later_too(
    shop: Any, served: Served, tmp_path: Path
) -> None:
    """No shoes beside p0, an Acme bag always; nothing is fitted anew for rules."""
    ruled = tmp_path / "shop"
    shutil.copytree(served.shop, ruled)
    bag = "{slot: bag, attributes: {brand: Acme}}"
    (ruled / "rules.yaml").write_text(
        "rules:\n  - {when: {item: p0}, excludes: {slot: shoes}}\n" + f"  - {{when: {{item: p0}}, requires: {bag}}}\n"
    )
    recipe = tmp_path / "ruled.yaml"
    recipe.write_text(served.recipe.read_text().replace(str(served.shop), str(ruled)))
    fitted = sorted(served.fitted.rglob("*"))
    shoes = {f"p{number}" for number in range(96) if number // 6 % 4 == 2} | {"late"}
    bags = {f"p{number}" for number in range(1, 96, 2) if number // 6 % 4 == 3}

    def read(client: Any) -> tuple[list[str], list[set[str]]]:
        single = post(client, "/v1/complete", items=["p0"], k=96)["results"]
        whole = post(client, "/v1/compose", items=["p0"], k=5)["results"]
        return [one["item_id"] for one in single], [set(one["items"]) for one in whole]

    single, whole = read(shop)
    assert shoes & set(single)
    assert any(shoes & one for one in whole)
    assert not all(bags & one for one in whole)
    with serve(served, tmp_path, recipe=str(recipe)) as client:
        late = {"title": "w10 w30 w132", "category": "Shop > Shoes", "slot": "shoes", "price": 5.0}
        assert client.put("/v1/items/late", json=late).status_code == 201
        single, whole = read(client)
        assert single
        assert not shoes & set(single)
        assert len(whole) == 5
        assert all(bags & one and not shoes & one for one in whole), whole
        assert "late" in [one["item_id"] for one in post(client, "/v1/complete", items=["p6"], k=96)["results"]]
        broken = client.post("/v1/compose", json={"items": ["p0", "late"]})
        assert broken.status_code == 400
        assert 'break the hard rule "excludes (slot shoes) when (item p0)"' in broken.json()["detail"]
    assert sorted(served.fitted.rglob("*")) == fitted


def test_a_promotion_over_http_changes_version_and_digest_together_and_rolls_back(shop: Any) -> None:
    before = post(shop, "/v1/complete", items=["p1"])["origin"]
    assert before["version"] == "tiny@v1"
    moved = post(shop, "/v1/adapters/promote", alias="tiny@prod", version="tiny@v2")
    assert moved["arms"]["prod"]["version"] == "tiny@v2"
    after = post(shop, "/v1/complete", items=["p1"])["origin"]
    assert after["version"] == "tiny@v2"
    assert after["digest"] != before["digest"]
    refused = shop.post("/v1/adapters/promote", json={"alias": "tiny@prod", "version": "tiny@v9"})
    assert refused.status_code in (404, 409)
    assert refused.headers["content-type"] == "application/problem+json"
    assert post(shop, "/v1/adapters/rollback", alias="tiny@prod")["arms"]["prod"]["version"] == "tiny@v1"
    assert [row.action for row in shop.store.audit_log()][-2:] == ["promote", "rollback"]


def test_a_person_is_in_no_file_of_state_and_no_kept_recommender(shop: Any, served: Served) -> None:
    user = "somebody-with-a-name"
    events = [{"user": user, "item_id": item, "kind": "purchase"} for item in ("p1", "p7")]
    assert post(shop, "/v1/events", events=events)["accepted"] == 2
    known = post(shop, "/v1/recommend", user=user)
    assert not any("not known" in note for note in known["notes"])
    removed = shop.delete(f"/v1/users/{user}").json()["removed"]
    assert removed["events"] == 2
    forgotten = post(shop, "/v1/recommend", user=user)
    assert forgotten["results"] != known["results"] or forgotten["origin"]["answered_by"] == "popularity"
    assert shop.delete(f"/v1/users/{USER}").status_code == 200  # of the catalogue's own bundles
    files = [f for root in (shop.state_folder, served.fitted, served.cache) for f in root.rglob("*") if f.is_file()]
    assert len(files) > 5
    for file in files:
        assert user.encode() not in file.read_bytes(), file


def test_a_dead_worker_is_started_anew_and_figures_are_those_of_all(tmp_path: Path) -> None:
    program = (
        "from peft_combo.serving.config import make_config\nfrom peft_combo.serving.processes import serve\n"
        f"values = {{'recipe': 'none', 'port': 0, 'workers': 2, 'state': {str(tmp_path / 'state')!r}}}\n"
        "tell = lambda text: print(text, flush=True)\n"
        f"serve(make_config(values), tell, lambda lines: tell(lines[0]), None, [{str(WORKER)!r}])\n"
    )
    with run_service([sys.executable, "-c", program]) as (url, process):
        workers = find_children(process.pid)
        assert len(workers) == 2
        for _ in range(6):  # each on a connection of its own, so that both workers have a share
            assert httpx.post(f"{url}/v1/complete", json={"items": ["F1"]}, timeout=30).status_code == 200
        os.kill(workers[0], signal.SIGKILL)
        end = time.monotonic() + 30
        while time.monotonic() < end and len({*find_children(process.pid)} - {workers[0]}) < 2:
            time.sleep(0.05)
        assert len({*find_children(process.pid)} - {workers[0]}) == 2
        counted = re.search(r'seconds_count{.*complete"} (\S+)', httpx.get(f"{url}/metrics", timeout=30).text)
        assert counted is not None
        assert float(counted[1]) == 6
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_with_a_certificate_it_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", "/CN=shop", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    program = (
        "from peft_combo.serving.config import make_config\nfrom peft_combo.serving.processes import serve\n"
        f"values = {{'recipe': 'none', 'port': 0, 'workers': 1, 'state': {str(tmp_path / 'state')!r},\n"
        f"          'tls_cert': {str(cert)!r}, 'tls_key': {str(key)!r}}}\n"
        "tell = lambda text: print(text, flush=True)\n"
        f"serve(make_config(values), tell, lambda lines: tell(lines[0]), None, [{str(WORKER)!r}])\n"
    )
    with run_service([sys.executable, "-c", program]) as (url, process):
        assert url.startswith("https://127.0.0.1:")
        known = ssl.create_default_context(cafile=str(cert))
        answer = httpx.post(f"{url}/v1/complete", json={"items": ["F1"]}, timeout=30, verify=known)
        assert answer.status_code == 200
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{url}/health/live", timeout=30)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url.replace('https', 'http')}/health/live", timeout=30)
        process.terminate()
        assert process.wait(30) == 0


def find_children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_help_and_a_missing_extra_need_nothing_installed(tmp_path: Path) -> None:
    names = "fastapi", "uvicorn", "sqlalchemy", "prometheus_client"
    blocked = (
        f"import importlib.util, sys\nfor name in {names!r}: sys.modules[name] = None\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name in {names!r} else find(name, *a)\n"
        "from peft_combo.__main__ import main\nmain()\n"
    )

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", blocked, *words], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

    assert call("serve", "--help").returncode == 0
    refused = call("serve", "--recipe", "lora-fashion")
    assert refused.returncode == 1
    assert re.fullmatch(r"The service needs .*: pip install 'peft-combo\[serve\]'\n", refused.stderr)
