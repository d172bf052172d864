"""Requests to the service: the recommender's, with an alias, a cursor and an id of the request."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from peft_combo.recommender.requests import Request

_Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ServiceRequest(Request):
    """What is asked of the service; the same body on every route of the recommender.

    The one statement of fields, bounds and defaults beside `Request`: bodies of HTTP become this.
    """

    adapter: str | None = Field(
        default=None, max_length=200,
        description="Alias that answers, as in fashion@prod; the first that is served where none is given.",
    )  # fmt: skip
    cursor: str | None = Field(
        default=None, max_length=4_000, description="The next_cursor of an answer: what comes after it."
    )
    request_id: _Id | None = Field(
        default=None, description="Id of this request, which comes back; made up where none is given."
    )
    swap: _Id | None = Field(default=None, description="Of items the one whose place is to be taken (replace).")
    bundles: list[list[str]] | None = Field(
        default=None, max_length=1_000, description="Bundles to rank, each the ids of its items (rank)."
    )
