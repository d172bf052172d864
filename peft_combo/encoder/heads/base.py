"""Base class of task heads: parameters, stored specification, and rebuilding from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from peft_combo.errors import StoreError

HEAD_FILE = "head.safetensors"


class TaskHead(nn.Module):
    """What stands on the encoder.

    Attributes:
        kind: the task, as in `task.kind` of a recipe. dim: width of the vectors or states it takes.
    """

    kind: ClassVar[str]
    dim: int

    def spec(self) -> dict[str, Any]:
        """Return what rebuilds it besides its weights; goes into the manifest."""
        raise NotImplementedError


HeadT = TypeVar("HeadT", bound=TaskHead)


def rebuild_head(make: Callable[[], HeadT], weights: Mapping[str, Tensor]) -> HeadT:
    """Build a stored head with `make` and give it its weights; in evaluation mode.

    Raises:
        StoreError: the weights are not those of such a head, or its description lacks something.
    """
    try:
        head = make()
        head.load_state_dict(dict(weights))
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise StoreError(f"The stored head does not match its description: {str(error).splitlines()[0]}") from error
    return head.eval().requires_grad_(False)
