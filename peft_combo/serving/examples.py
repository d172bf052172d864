"""The description of the service (OpenAPI), with examples of the catalogue it serves: each can be sent as it stands.

Owns what stands in /openapi.json beyond what FastAPI finds in the routes' signatures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from peft_combo.serving.problems import ProblemBody

if TYPE_CHECKING:  # the engine loads torch; what answers for it does not
    from peft_combo.serving.service import Service


def describe_service(app: FastAPI, service: Service) -> None:
    """Let an application describe itself, once, when it is first asked."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(app, list_examples(service))
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _complete(app: FastAPI, examples: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add examples, problems and keys to what FastAPI found."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["ProblemBody"] = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    told = "A key of peft-combo serve keys add."
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": told}}
    for path, verbs in document["paths"].items():
        for operation in verbs.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                if path in examples:
                    media["examples"] = {name: {"value": value} for name, value in examples[path].items()}
    return document


def list_examples(service: Service) -> dict[str, dict[str, Any]]:
    """Return bodies by path and name, made of items, users and queries that are there."""
    found = service.list_examples()
    baskets = [[item["item_id"] for item in one["items"]] for one in found.get("baskets", [])]
    users = [one["user"] for one in found.get("users", [])]
    queries = list(found.get("queries", []))
    aliases = [one.alias for one in service.list_adapters()]
    basket = baskets[0] if baskets else []
    query = queries[0] if queries else "linen shirt"
    first = basket[0] if basket else "item-1"
    for_items: dict[str, Any] = {"items": {"items": basket, "k": 3}} if basket else {}
    for_user: dict[str, Any] = {"user": {"user": users[0], "k": 3}} if users else {}
    for_query = {"query": {"query": query, "k": 3}}
    texts = {"texts": {"texts": [query]}}
    return {
        "/v1/recommend": {**for_items, **for_user, **for_query},
        "/v1/complete": for_items,
        "/v1/compose": {**for_items, **for_query},
        "/v1/replace": {"swap": {"items": basket, "swap": first, "k": 3}} if basket else {},
        "/v1/search": for_query,
        "/v1/rank": {"bundles": {"bundles": baskets[:3], "query": query}} if baskets else {},
        "/v1/embeddings": {
            "one": {"input": query},
            "several": {"input": [query, "summer hat"], "model": aliases[0] if aliases else None,
                        "encoding_format": "base64"},
        },
        "/v1/tag": texts,
        "/v1/match": {"template": {"text": "Where is my parcel?", "templates": ["It is on its way.", "It is blue."]}},
        "/v1/items/{item_id}": {"item": {"title": "Linen shirt, sage", "price": 39.9}},
        "/v1/items:batch": {"lines": '{"item_id": "new-1", "title": "Linen shirt, sage", "price": 39.9}\n'},
        "/v1/events": {"view": {"events": [{"user": "u1", "item_id": first, "kind": "view"}]}},
    }  # fmt: skip
