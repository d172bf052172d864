"""What the tests share: where real data lies, and tiny real encoders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_data(name: str) -> Path:
    """Return a folder of real data, or skip the calling test with the reason."""
    root = Path(os.environ.get("PEFT_COMBO_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / name
    if not folder.exists():
        pytest.skip(f"real data {name!r} is not on this machine (PEFT_COMBO_DATA names its folder)")
    return folder
