"""A Chinese shop behind the service: a query in Chinese becomes a bundle, with its budget and its names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_combo.serving.app import make_app, make_context
from peft_combo.serving.config import make_config
from peft_combo.serving.service import Service
from peft_combo.serving.state import State

NAMES = {"外套": ("风衣", 300), "鞋": ("短靴", 200), "包": ("托特包", 150), "上装": ("衬衫", 80), "下装": ("西裤", 90)}
COLOURS = ("黑色", "白色", "红色", "蓝色", "卡其色", "酒红色")


@pytest.fixture(scope="module")
def client(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from starlette.testclient import TestClient

    folder, dice = tmp_path_factory.mktemp("zh"), random.Random(1)
    items = [
        f"{slot}{place},{colour}{name}女 新款包邮,服装 > {slot},{slot},{price + 10 * place}"
        for slot, (name, price) in NAMES.items()
        for place, colour in enumerate(COLOURS)
    ]
    bundles = [
        f"b{bundle},{slot}{place}"
        for bundle in range(60)
        for place in (dice.randrange(len(COLOURS)),)
        for slot in dice.sample(list(NAMES), 3)
    ]
    meta = [f"b{bundle},u{bundle % 20}" for bundle in range(60)]
    for name, lines in {
        "items": ["item_id,title,category,slot,price", *items], "bundles": ["bundle_id,item_id", *bundles],
        "bundle_meta": ["bundle_id,user_id", *meta],
    }.items():  # fmt: skip
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "zh.yaml").write_text(
        f"category: zh\nstore: {folder / 'adapters'}\nbackbone: {{model: {tiny_bert}, max_length: 16}}\n"
        f"data: {{source: folder, path: {folder}}}\nadapter: {{method: lora}}\n",
        encoding="utf-8",
    )
    config = make_config(
        {"recipe": str(folder / "zh.yaml"), "state": str(folder / "state"), "vectors": folder / "vectors",
         "fitted": folder / "fitted"}
    )  # fmt: skip
    state = State.open(folder / "state")
    service = Service.open(config, state, lambda note: None)
    with TestClient(make_app(make_context(config, service, state)), base_url="http://127.0.0.1:8765") as opened:
        yield opened
    service.close()
    state.close()


def test_a_chinese_query_composes_a_bundle_over_http(client: Any) -> None:
    answer = client.post("/v1/compose", json={"query": "黑色风衣配短靴，预算六百元以内", "k": 3})
    assert answer.status_code == 200, answer.text
    best = answer.json()["results"][0]
    prices = {f"{slot}{place}": NAMES[slot][1] + 10 * place for slot in NAMES for place in range(len(COLOURS))}
    assert "外套0" in best["items"]  # the black one of them
    assert any(item.startswith("鞋") for item in best["items"])
    assert sum(prices[item] for item in best["items"]) <= 600


def test_a_chinese_search_finds_what_it_names(client: Any) -> None:
    answer = client.post("/v1/search", json={"query": "紅色襯衫" if _folds() else "红色衬衫", "k": 2})
    assert answer.status_code == 200, answer.text
    assert "红色衬衫" in str(answer.json()["results"][0])


def _folds() -> bool:
    import importlib.util

    return importlib.util.find_spec("opencc") is not None
