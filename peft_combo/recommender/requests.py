"""Requests to a recommender as data: one from the command line, or a batch file of them.

Owns what a request may say with its defaults, how a file of them is read and how answers are written. Knows nothing of
scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_combo.data.sessions import check_session_items
from peft_combo.errors import DataError, PeftComboError, did_you_mean, shorten
from peft_combo.files import atomic_file, check_file_target
from peft_combo.recipe.fields import format_value
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.filters import Filter

if TYPE_CHECKING:  # a request is checked before an encoder is there, so without loading torch
    from peft_combo.data.labels.tags import Tagger
    from peft_combo.recommender.recommender import BundleRecommender
    from peft_combo.recommender.results import DetectedBundle, Recommendation, Suggestion

_LINE_LIMIT = 1 << 20  # bytes; a longer line is no request
_ROWS = 1024  # answers written to Parquet at a time


class Request(BaseModel):
    """What is asked of a recommender; see `BundleRecommender.compose` and `complete`.

    The one statement of fields, bounds and defaults: options of the command line and lines of a file become this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    id: str | int | None = Field(default=None, description="Id that comes back with the answer.")
    items: list[str] = Field(default=[], max_length=1000, description="Ids of items that every bundle holds.")
    session: list[str] | None = Field(
        default=None, max_length=1000, description="Ids of a session's items, in which bundles are detected."
    )
    sure: bool = Field(default=False, description="Smaller and surer bundles of a session.")
    user: str | None = Field(default=None, description="Id of the user to personalise for.")
    query: str | None = Field(default=None, max_length=10_000, description="Query in words.")
    single: bool = Field(default=False, description="Single items that complete, in place of bundles.")
    k: int = Field(default=Options.k, ge=1, le=1000, description="Number of bundles or items.")
    slots: list[str] | None = Field(default=None, description="Required slots of a bundle.")
    without_slots: list[str] | None = Field(default=None, description="Forbidden slots of new items.")
    budget: float | None = Field(default=None, gt=0, le=1e12, description="Maximum price of the bundle.")
    max_price: float | None = Field(default=None, ge=0, le=1e12, description="Maximum price of a new item.")
    season: str | None = Field(default=None, description="Season of new items.")
    categories: list[str] = Field(default=[], description='Category paths of new items, as in "A > B".')
    size: int | None = Field(default=None, ge=1, le=1000, description="Number of items in a bundle.")
    in_stock: bool = Field(default=False, description="New items in stock only.")
    diversity: float = Field(default=Options.diversity, ge=0, le=1, description="Diversity of the list, 1 most varied.")
    substitute: bool = Field(default=False, description="Substitutes, in place of complements.")
    not_like: list[str] = Field(
        default=[],
        max_length=1000,
        description="Ids of rejected items: never shown, and what is like them comes later.",
    )
    exclude: list[str] = Field(default=[], max_length=10_000, description="Ids of items that are not shown.")
    exclude_seen: bool = Field(default=True, description="What the user took before is not shown.")
    filter: Filter | None = Field(default=None, description="Conditions that new items must and must not meet.")
    explain: bool = Field(default=False, description="Explanation of every item: scores and evidence.")

    @property
    def constraints(self) -> Constraints:
        """What new items and bundles must keep to."""
        return Constraints(
            budget=self.budget, price_max=self.max_price, in_stock=self.in_stock, season=self.season,
            categories=tuple(self.categories), size=None if self.size is None else (self.size, self.size),
            filter=self.filter,
        )  # fmt: skip

    @property
    def options(self) -> Options:
        """How bundles are searched for."""
        return Options(k=self.k, diversity=self.diversity, mode="substitute" if self.substitute else "complement")


def parse_request(values: Mapping[str, Any]) -> Request:
    """Check the fields of a request; those that are not given have their defaults.

    Raises:
        DataError: a field is unknown, or a value is none it may have.
    """
    for name, value in values.items():
        for text in (name, *(value if isinstance(value, list) else [value])):
            if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
                raise DataError(
                    f"{shorten(name)}: expected text, found half a character, {ascii(half[0])[1:-1]}, in "
                    f"{format_value(text)}. It was cut inside an emoji: cut whole characters, not UTF-16 units."
                )
    try:
        request = Request.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = shorten(".".join(str(part) for part in first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(name, Request.model_fields) or f"Fields: {', '.join(Request.model_fields)}."
            raise DataError(f'A request has no field "{name}". {hint}') from error
        found = format_value(first["input"])
        if first["loc"][0] == "id":
            raise DataError(f"id: expected a text or an integer, found {found}.") from error
        raise DataError(f"{name}: {first['msg']}, found {found}.") from error
    _check_session(request)
    return request


def _check_session(request: Request) -> None:
    """Refuse a session of fewer than two items, and what else is asked of it."""
    if request.session is None:
        if request.sure:
            raise DataError(
                "sure: it is for the bundles of a session, and there is none. Add session, or leave it out."
            )
        return
    check_session_items(request.session)
    beside = [
        name
        for name, field in Request.model_fields.items()
        if name not in ("id", "session", "sure", "k") and getattr(request, name) != field.default
    ]
    if beside:
        raise DataError(
            f"session: bundles are detected among its items alone, so it does not go with {', '.join(beside)}. "
            "Leave these out; what completes or personalises a bundle is asked by items or user."
        )


def answer(
    recommender: BundleRecommender, request: Request, tagger: Tagger | None = None
) -> list[Suggestion] | list[Recommendation] | list[DetectedBundle]:
    """Answer one request.

    Args:
        tagger: takes queries apart; see `BundleRecommender.compose`.
    Raises:
        DataError: an id is not known, there is nothing to go by, or no bundle meets the constraints.
    """
    if request.session is not None:
        most = request.k if "k" in request.model_fields_set else None
        return recommender.detect_bundles(request.session, most, sure=request.sure)
    if request.single:
        return recommender.complete(
            request.items, user=request.user, query=request.query, k=request.k, constraints=request.constraints,
            required=request.slots, forbidden=request.without_slots, not_like=request.not_like,
            exclude=request.exclude, exclude_seen=request.exclude_seen, explain=request.explain,
        )  # fmt: skip
    return recommender.compose(
        request.items, user=request.user, query=request.query, tagger=tagger, constraints=request.constraints,
        required=request.slots, forbidden=request.without_slots, options=request.options, not_like=request.not_like,
        exclude=request.exclude, exclude_seen=request.exclude_seen, explain=request.explain,
    )  # fmt: skip


@dataclass(frozen=True)
class AnswerCounts:
    """What became of a file: how many requests there were, and the errors of those that had no answer, by line.

    Attributes:
        fault: the first error that was no refusal of a request but a fault of ours; None where there was none.
    """

    requests: int
    errors: dict[int, str]
    fault: Exception | None = None


def answer_file(
    recommender: BundleRecommender,
    source: Path,
    target: Path,
    defaults: Request | None = None,
    advance: Callable[[int], None] | None = None,
    tagger: Tagger | None = None,
) -> AnswerCounts:
    """Answer a file of requests, one JSON object a line; a bad one costs its own answer and no other.

    Args:
        target: ``.jsonl``, an object for each request with its answers; or ``.parquet``, a row for each answer. It
            appears when it is whole.
        defaults: what every request asks for that does not say otherwise.
        advance: told 1 after each request.
        tagger: as for `answer`.
    Raises:
        DataError: a file cannot be read or written, the ending is another, or both are one file.
    """
    _check_source(source)
    if target.exists() and target.samefile(source):
        raise DataError(f"Answers would replace the requests in {source}. Name another file for them.")
    errors: dict[int, str] = {}
    fault: Exception | None = None
    given = {} if defaults is None else defaults.model_dump(exclude={"id"}, exclude_unset=True)
    count = 0
    with _open_target(target) as write:
        for number, line in _read_lines(source):
            count += 1
            told: dict[str, Any] = {"line": number, "id": None, "results": [], "error": None}
            try:
                values = _parse_line(line)
                told["id"] = _read_id(values)
                request = parse_request({**given, **values})
                told["results"] = [asdict(one) for one in answer(recommender, request, tagger)]
            except PeftComboError as error:
                told["error"] = errors[number] = str(error)
            except Exception as error:  # whatever it is, the answers to all other requests are not lost by it
                told["error"] = errors[number] = f"A fault of peft-combo: {type(error).__name__}: {error}"
                fault = fault or error
            write(told)
            if advance is not None:
                advance(1)
    return AnswerCounts(count, errors, fault)


def count_requests(source: Path) -> int:
    """Return how many requests a file holds; 0 of a pipe, which can be read only once.

    Raises:
        DataError: it cannot be read, or is no file of requests.
    """
    _check_source(source)
    return 0 if source.exists() and not source.is_file() else sum(1 for _ in _read_lines(source))


def _check_source(source: Path) -> None:
    """Refuse files of another kind at once, rather than line by line."""
    ending = source.suffix.lower()
    if ending in (".csv", ".tsv", ".xlsx", ".xls", ".parquet", ".gz", ".zip"):
        raise DataError(f"Requests are read as .jsonl, a JSON object on each line; found {ending} ({source}).")
    if source.is_file():
        with _reading(source) as file:
            start = file.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"Expected requests in UTF-8, found UTF-16 in {source}. Save the file as UTF-8.")
        if start == b"PAR1" or start[:2] in (b"\x1f\x8b", b"PK"):
            raise DataError(f"Expected a JSON object on each line, found a table or an archive in {source}.")


@contextmanager
def _reading(source: Path) -> Iterator[IO[bytes]]:
    try:
        with source.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"The requests in {source} cannot be read: {error.strerror or error}.") from error


def _read_lines(source: Path) -> Iterator[tuple[int, bytes]]:
    with _reading(source) as file:
        number = 0
        while line := file.readline(_LINE_LIMIT + 1):
            number += 1
            while len(line) > _LINE_LIMIT and not line.endswith(b"\n") and (more := file.readline(_LINE_LIMIT)):
                line = line[:_LINE_LIMIT] + b"?" + more[-1:]  # too long: its end is looked for, its rest dropped
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _parse_line(line: bytes) -> dict[str, Any]:
    if len(line) > _LINE_LIMIT:
        raise DataError(f"A request has at most {_LINE_LIMIT:,} bytes.")
    try:
        values = json.loads(line.decode(), object_pairs_hook=_refuse_repeats)
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x} at byte {error.start + 1}"
        raise DataError(f"Expected UTF-8, found {byte}. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"Expected a JSON object: {error.msg.removesuffix(' at')} at character {error.pos + 1}."
        ) from error
    except ValueError as error:  # the digits that Python makes an integer of are bounded
        raise DataError("Expected a JSON object, found a number of very many digits in it.") from error
    except RecursionError as error:
        raise DataError("Expected a JSON object, found one that is nested too deep.") from error
    if not isinstance(values, dict):
        raise DataError(f'Expected a JSON object such as {{"items": ["F1"]}}, found {format_value(values)}.')
    return values


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{shorten(twice)} is given twice. Keep one of them.")
    return values


def _read_id(values: Mapping[str, Any]) -> str | int | None:
    """Return the id a request gives itself, which comes back even where the rest of it is wrong."""
    given = values.get("id")
    if isinstance(given, str):
        return given.encode("utf-8", "backslashreplace").decode()  # who reads the answers may refuse half a character
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def check_files(source: Path, target: Path) -> int:
    """Return how many requests a file holds, if it can be read and the answers can be written; ask before a long job.

    Raises:
        DataError: one cannot be, both are the same file, or the ending of `target` is another than of `answer_file`.
        PeftComboError: the target cannot be written.
    """
    _choose_writer(target)
    check_file_target(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"The answers would take the place of the requests in {source}. Name another file with --to.")
    return count_requests(source)


@contextmanager
def _open_target(target: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a writer of answers by the file's ending; the file takes its place when all went well."""
    kind = _choose_writer(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file, kind(file) as write:
            yield write
    except OSError as error:
        raise DataError(f"The answers cannot be written to {target}: {error.strerror or error}.") from error


def _choose_writer(target: Path) -> Callable[[IO[bytes]], AbstractContextManager[Callable[[dict[str, Any]], None]]]:
    kind = {".jsonl": _write_jsonl, ".parquet": _write_parquet}.get(target.suffix.lower())
    if kind is None:
        raise DataError(f"Answers are written as .jsonl or .parquet, found {target.suffix or 'no ending'!r}.")
    return kind


@contextmanager
def _write_jsonl(file: IO[bytes]) -> Iterator[Callable[[dict[str, Any]], None]]:
    def write(told: dict[str, Any]) -> None:
        file.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")

    yield write


@contextmanager
def _write_parquet(file: IO[bytes]) -> Iterator[Callable[[dict[str, Any]], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.list_(pa.string())
    schema = pa.schema(
        [
            ("line", pa.int64()), ("id", pa.string()), ("rank", pa.int64()), ("items", texts), ("added", texts),
            ("score", pa.float64()), ("price", pa.float64()), ("details", pa.string()), ("error", pa.string()),
        ]
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

        def write(told: dict[str, Any]) -> None:
            rows.extend(_build_rows(told))
            if len(rows) >= _ROWS:
                flush()

        yield write
        flush()


def _build_rows(told: dict[str, Any]) -> list[dict[str, Any]]:
    same = {"line": told["line"], "id": None if told["id"] is None else str(told["id"]), "error": told["error"]}
    if not told["results"]:
        return [same]
    found = []
    for rank, one in enumerate(told["results"], 1):
        items = one["items"] if "items" in one else [one["item_id"]]
        added = one.get("added", items)
        found.append(
            {
                **same, "rank": rank, "items": items, "added": added, "score": one["score"], "price": one["price"],
                "details": json.dumps(one, ensure_ascii=False),
            }
        )  # fmt: skip
    return found
