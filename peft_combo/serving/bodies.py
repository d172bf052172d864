"""Bodies of requests and answers over HTTP: fields, bounds and defaults, each stated once.

What the recommender is asked is `ServiceRequest`; here is the rest. Knows no route.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter

from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.state.rows import EventKind, FeedbackKind

_PLAIN = r"^[^\x00-\x1f\x7f\u2028\u2029]+$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_PLAIN)]
"""An id from outside: at most 200 characters, none of them a control character."""

TextLine = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
_MOST_TEXTS = 2048
_MOST_COLUMNS = 100


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# --- the encoder by itself


class EmbeddingsBody(_Body):
    """A request for embeddings, as OpenAI's clients send it; what is of no use here is not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    input: TextLine | Annotated[list[TextLine], Field(min_length=1, max_length=_MOST_TEXTS)] = Field(
        description="A text, or several."
    )
    model: str | None = Field(
        default=None, max_length=200, description="Alias or version of the adapter, as in fashion@prod."
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="Numbers, or little-endian float32 in base64."
    )
    dimensions: int | None = Field(default=None, ge=1, description="The encoder's own dimension, or none.")
    user: str | None = Field(default=None, max_length=1000, description="Accepted and not looked at.")


class TextsBody(_Body):
    """Texts to tag or classify."""

    texts: list[TextLine] = Field(min_length=1, max_length=_MOST_TEXTS, description="Texts.")
    adapter: str | None = Field(default=None, max_length=200, description="Alias or version of the adapter.")


class ClassifyBody(_Body):
    """Texts to classify."""

    texts: list[TextLine] = Field(min_length=1, max_length=_MOST_TEXTS, description="Texts.")
    adapter: str = Field(max_length=200, description="Alias or version of a classification adapter.")


class MatchBody(_Body):
    """A text and the answers that could fit it."""

    text: TextLine = Field(description="What was said.")
    templates: list[TextLine] = Field(min_length=1, max_length=_MOST_TEXTS, description="Answer templates.")
    adapter: str | None = Field(default=None, max_length=200, description="Alias or version of the adapter.")
    k: int = Field(default=5, ge=1, le=1000, description="Number of templates.")


class RateBody(_Body):
    """Whom and what to rate."""

    adapter: str = Field(max_length=200, description="Alias or version of a rating adapter.")
    user: str | None = Field(default=None, max_length=1000, description="Id of the user.")
    liked: list[str] = Field(default=[], max_length=1000, description="Ids of items that were liked.")
    items: list[str] = Field(default=[], max_length=1000, description="Ids of items to rate; all where none is given.")
    k: int = Field(default=10, ge=1, le=1000, description="Number of items.")


# --- items, events, feedback


class ItemBody(BaseModel):
    """An item to put: the columns of the catalogue, and any more of your own. A change names what changes."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue]

    title: str | None = Field(default=None, max_length=10_000, description="Title; an item without one is refused.")
    category: str | None = Field(default=None, max_length=1000, description='Category path, as in "A > B".')
    slot: str | None = Field(default=None, max_length=200, description="Slot, as in shoes.")
    price: float | None = Field(default=None, ge=0, description="Price.")
    description: str | None = Field(default=None, max_length=10_000, description="Description.")


class BatchItem(ItemBody):
    """One line of a batch: an item with its id."""

    item_id: Id = Field(description="Id of the item.")


class EventBody(_Body):
    """What a user did."""

    user: Id = Field(description="Id of the user; only a keyed hash of it is stored.")
    item_id: Id = Field(description="Id of the item.")
    kind: EventKind = Field(description="What was done.")
    value: float | None = Field(default=None, ge=0, le=1_000_000, description="Value of a rating, 1 to 5.")
    time: float | None = Field(default=None, ge=0, le=1e11, description="Seconds since 1970; now where none is given.")
    event_id: Id | None = Field(default=None, description="Your id of it; what is sent again under it counts once.")


class EventsBody(_Body):
    """Events."""

    events: list[EventBody] = Field(min_length=1, max_length=10_000, description="Events.")


class FeedbackBody(_Body):
    """What became of an answer."""

    request_id: Id = Field(description="Id of the request that was answered.")
    kind: FeedbackKind = Field(description="What was done with it.")
    item_id: Id | None = Field(default=None, description="Id of the item; none for the answer as a whole.")
    value: float | None = Field(default=None, ge=0, le=1_000_000, description="Value, as of a rating.")


# --- adapters


class AliasBody(_Body):
    """An alias."""

    alias: Id = Field(description="Alias, as in fashion@prod.")


class PromoteBody(AliasBody):
    """What an alias is to mean from now on."""

    version: Id = Field(description="Version, as in fashion@v3.")
    split: dict[Literal["prod", "next"], Annotated[float, Field(ge=0, le=100)]] | None = Field(
        default=None, description='Shares in per cent, {"prod": 90, "next": 10}; all of it where none is given.'
    )
    shadow: bool = Field(default=False, description="Answer beside prod, unseen.")
    wait: bool = Field(default=True, description="Answer when it is in use; else at once, with the job.")


# --- answers, for the description of the service


class OriginBody(BaseModel):
    """Where an answer comes from."""

    alias: str = Field(description="What was asked for, as in fashion@prod.")
    version: str = Field(description="The version behind it, as in fashion@v3; frozen for the encoder alone.")
    digest: str = Field(description="Digest of the adapter.")
    release: str = Field(description="Digest of adapter, item vectors and fitted recommender together.")
    arm: str = Field(description="prod or next.")
    answered_by: Literal["fusion", "text", "cf", "popularity"] = Field(description="Who answered.")
    fallbacks: list[str] = Field(default=[], description="What had nothing to say before.")


class AnswerBody(BaseModel):
    """An answer of the recommender."""

    request_id: str = Field(description="Id of the request; feedback names it.")
    results: list[dict[str, Any]] = Field(description="Items or bundles, best first.")
    next_cursor: str | None = Field(description="Gives what comes next.")
    took_ms: float = Field(description="Time of the answer, ms.")
    origin: OriginBody
    notes: list[str] = Field(description="What was noticed.")


class ResultsBody(BaseModel):
    """Results of the encoder, one for each text."""

    request_id: str
    results: list[Any]
    took_ms: float
    origin: OriginBody


class AcceptedBody(BaseModel):
    """How many of what was given were taken in; they are on the disk."""

    request_id: str
    accepted: int
    errors: list[dict[str, Any]] = Field(default=[], description="Per refused line: line, item_id, detail.")


BATCH_LINE: TypeAdapter[BatchItem] = TypeAdapter(BatchItem)

_MODELS: tuple[type[BaseModel], ...] = (
    ServiceRequest, EmbeddingsBody, TextsBody, ClassifyBody, MatchBody, RateBody, ItemBody, BatchItem, EventBody,
    EventsBody, FeedbackBody, AliasBody, PromoteBody,
)  # fmt: skip


def list_fields(model: str) -> tuple[str, ...]:
    """Return the names of a model's fields by its class name, to find the nearest."""
    return next((tuple(one.model_fields) for one in _MODELS if one.__name__ == model), ())
