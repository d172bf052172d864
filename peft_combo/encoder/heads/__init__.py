"""Task heads at inference: bundle completion, sequence, rating, classification, tagging, masked words, answers.

Owns what turns vectors into answers, and how a stored head is rebuilt. Knows nothing of losses and batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.heads.masked import MaskedHead
from peft_combo.encoder.heads.matching import MatchingHead
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.encoder.heads.tagging import TaggingHead
from peft_combo.errors import StoreError

__all__ = [
    "BundleHead",
    "ClassificationHead",
    "MaskedHead",
    "MatchingHead",
    "RatingHead",
    "SequenceHead",
    "TaggingHead",
    "TaskHead",
    "load_head",
]


def load_head(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> TaskHead:
    """Rebuild a stored head, in evaluation mode.

    Raises:
        StoreError: there is no such task here, or the weights are not those of its head.
    """
    match spec.get("kind"):
        case "bundle":
            return BundleHead.from_spec(spec, weights)
        case "classification":
            return ClassificationHead.from_spec(spec, weights)
        case "rating":
            return RatingHead.from_spec(spec, weights)
        case "sequence":
            return SequenceHead.from_spec(spec, weights)
        case "tagging":
            return TaggingHead.from_spec(spec, weights)
        case "masked":
            return MaskedHead.from_spec(spec, weights)
        case "matching":
            return MatchingHead.from_spec(spec, weights)
        case kind:
            raise StoreError(
                f"The adapter was tuned for {kind!r}; expected bundle, classification, rating, sequence, tagging, "
                "masked or matching."
            )
