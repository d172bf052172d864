"""Result of one run of a comparison, as JSON that is checked when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

RECIPE, SAMPLE, RESULT, FAILED, LOG = "recipe.yaml", "sample.json", "result.json", "failed.txt", "log.txt"
BATCHES = (1, 32)
"""Texts that are encoded together where serving is timed."""


class Result(BaseModel):
    """One variant under one seed.

    Attributes:
        value: of `metric` on validation. clusters, before, after: see `metrics.report`; None where the metric
            is no mean over questions.
        asked: what the questions were, in words.
        seconds, peak_mib: of the run as a whole, data and frozen encoder included.
        encode_ms, frozen_ms: by number of texts, the median time to encode them with the adapter, and without.
        load_ms: to open the stored adapter, with its checks, and attach it.
        machine: what the times were measured on. adapter: the folder it is stored in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    metric: str
    value: float
    clusters: tuple[str, ...] | None
    before: tuple[float, ...] | None
    after: tuple[float, ...] | None
    asked: str
    adapter_parameters: int
    head_parameters: int
    stored_bytes: int
    steps: int
    seconds: float
    peak_mib: float
    encode_ms: dict[int, float]
    frozen_ms: dict[int, float]
    load_ms: float
    machine: str
    adapter: str


def read_result(folder: Path) -> Result | None:
    """Return the result in a folder; None where there is none that reads."""
    try:
        return Result.model_validate_json((folder / RESULT).read_bytes())
    except (OSError, ValidationError):
        return None
