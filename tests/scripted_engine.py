"""An engine that answers by a script: what the HTTP of the service is tested with, in milliseconds a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_combo.serving.answers import (
    AdapterStatus,
    Answer,
    ArmStatus,
    EngineFigures,
    ItemOutcome,
    Origin,
    ShownAnswer,
)
from peft_combo.serving.errors import Conflict, Overloaded, UnknownAdapter, UnknownItem
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.state import EventRow, ItemRow, State

ORIGIN = Origin("fashion@prod", "fashion@v1", "d" * 64, "r1", "prod")


class ScriptedEngine:
    """Knows the items F1 to F9. The user "boom" is a fault, "slow" takes a second, "full" finds a full queue."""

    def __init__(self, state: State) -> None:
        self.ready, self.answers, self.actors = True, 0, [""]
        self._state = state
        self._listeners: list[Callable[[ShownAnswer], None]] = []
        self.items = {
            f"F{n}": {"item_id": f"F{n}", "title": f"Linen dress {n}", "price": 10.0 * n} for n in range(1, 10)
        }

    def on_answer(self, listener: Callable[[ShownAnswer], None]) -> None:
        self._listeners.append(listener)

    def answer(self, request: ServiceRequest) -> Answer:
        if request.user == "boom":
            raise ValueError(f"user {request.user} is a secret")
        if request.user == "slow":
            time.sleep(1)
        if request.user == "full":
            raise Overloaded("The queue is full.", 2.5)
        for one in request.items:
            self.get_item(one)
        shown = [one for one in self.items if one not in request.items][: request.k]
        results = tuple(
            {**self.items[one], "score": 0.5, "shares": {"CEASE": 0.5}, "odd": float("nan")} for one in shown
        )
        self.answers += 1
        answer = Answer(request.request_id or "none", results, None, ORIGIN, 1.0, timing={"score": 0.5})
        for listener in self._listeners:
            listener(ShownAnswer("complete", request.user, tuple(request.items), answer, (1.0,) * len(results)))
        return answer

    recommend = complete = compose = replace = search = rank = answer

    def embed(self, texts: Sequence[str], adapter: str | None = None) -> tuple[Any, Origin]:
        if adapter not in (None, "fashion@prod"):
            raise UnknownAdapter(f'No adapter "{adapter}". Did you mean "fashion@prod"?')
        return np.array([[0.6, 0.8]] * len(texts), np.float32), ORIGIN

    def count_tokens(self, texts: Sequence[str]) -> int:
        return sum(len(text.split()) + 2 for text in texts)

    def tag(self, texts: Sequence[str], adapter: str | None = None) -> tuple[Any, Origin]:
        return [[{"text": text, "type": "ITEM", "start": 0, "end": len(text)}] for text in texts], ORIGIN

    def classify(self, texts: Sequence[str], adapter: str) -> tuple[Any, Origin]:
        return [[{"label": "A", "score": 1.0}] for _ in texts], ORIGIN

    def match(self, text: str, templates: Sequence[str], adapter: str | None = None, k: int = 5) -> tuple[Any, Origin]:
        return [{"index": n, "template": one, "score": 0.5} for n, one in enumerate(templates)][:k], ORIGIN

    def rate(self, adapter: str, **asked: Any) -> tuple[Any, Origin]:
        return [{"item_id": one, "title": "", "probability": 0.5} for one in asked["items"]], ORIGIN

    def find_items(self, words: str = "", limit: int = 20, cursor: str | None = None) -> tuple[Any, None, int]:
        found = [one for one in self.items.values() if words.lower() in str(one["title"]).lower()]
        return found[:limit], None, len(found)

    def get_item(self, item_id: str) -> dict[str, Any]:
        if item_id not in self.items:
            raise UnknownItem(f'No item has the id "{item_id}". Did you mean "F1"?')
        return self.items[item_id]

    def list_examples(self) -> dict[str, Any]:
        basket = [self.items["F1"], self.items["F2"]]
        return {"users": [{"user": "u1", "label": "u1"}], "baskets": [{"items": basket}], "queries": ["linen dress"]}

    def put_items(self, items: Sequence[Mapping[str, Any]]) -> list[ItemOutcome]:
        outcomes = []
        for item in items:
            if item.get("title"):
                self._state.put_items([ItemRow(item["item_id"], dict(item))])
                self.items[item["item_id"]] = dict(item)
                outcomes.append(ItemOutcome(item["item_id"], "created"))
            else:
                outcomes.append(ItemOutcome(item["item_id"], "refused", "An item needs a title."))
        return outcomes

    def delete_item(self, item_id: str) -> None:
        self.get_item(item_id)
        self._state.put_items([ItemRow(item_id, {}, deleted=True)])
        del self.items[item_id]

    def add_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        return self._state.add_events(
            [
                EventRow(self._state.identify(e["user"]), e["item_id"], e["kind"], event_id=e.get("event_id"))
                for e in events
            ]
        )

    def forget_user(self, user: str) -> dict[str, int]:
        return self._state.forget(self._state.identify(user))

    def list_adapters(self) -> list[AdapterStatus]:
        metrics = {"before": {"ndcg@10": 0.4}, "after": {"ndcg@10": 0.5}}
        arm = ArmStatus("fashion@v1", "d" * 64, "r1", 100.0, 0.0, self.answers, 1.0, 1000, metrics)
        return [AdapterStatus("fashion@prod", "told", {"prod": arm}, None, True)]

    def list_versions(self) -> list[dict[str, Any]]:
        return [{"version": "fashion@v1"}]

    def promote(self, alias: str, version: str, *, actor: str = "", **asked: Any) -> AdapterStatus:
        self.actors.append(actor)
        if version == "fashion@v9":
            raise Conflict("Another promotion runs.")
        self._state.put_deployment(alias, {"prod": (version, 100.0)}, actor)
        return self.list_adapters()[0]

    def load(self, alias: str, actor: str = "") -> AdapterStatus:
        return self.list_adapters()[0]

    def rollback(self, alias: str, *, actor: str = "") -> AdapterStatus:
        return self.list_adapters()[0]

    def unload(self, alias: str, *, actor: str = "") -> None: ...

    def measure(self) -> EngineFigures:
        return EngineFigures(
            0, 512, 4, 10, 3, 5, {}, {"fusion": self.answers}, {"scores": 0.1}, (), {"fashion@v1": 9}, 9, 0, 0
        )

    def close(self, timeout: float = 10.0) -> None:
        self.ready = False
