"""Reader of English review snippets that people rated: sentences of 309 customer reviews of five products.

They lie in the source archive of vaderSentiment (MIT), a tar within a tar, that pip downloads into a folder. Nothing in
it is run or unpacked onto the disk, and its rules of sentiment are not used.

Source: Hutto and Gilbert 2014, "VADER"; the reviews are those of Hu and Liu 2004, "Mining and summarizing customer
reviews". A snippet's rating is the mean of 20 people, -4 to 4.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from peft_combo.errors import DataError

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
_LIMIT = 16 * 2**20
_SURE = 0.5  # what people rate nearer to 0 is neither


def read_snippets(archive: Path) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """Return the snippets, of each its label in a tuple, and what was left out.

    Args:
        archive: the source archive of vaderSentiment, as it was downloaded.
    Raises:
        DataError: it is not that archive.
    """
    try:
        inner = _take(archive.read_bytes(), _INNER)
        lines = _take(inner, _FILE).decode("utf-8").splitlines()
        cells = [line.split("\t") for line in lines if line.strip()]
        rated = [(" ".join(text.split()), float(rating)) for _, rating, text in cells]
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise DataError(
            f"{archive} is not the archive it should be ({error}). Remove it, and get it again with: "
            f"pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {archive.parent}"
        ) from error
    kept = [(text, "positive" if rating > 0 else "negative") for text, rating in rated if abs(rating) >= _SURE]
    note = (
        f"{len(rated) - len(kept):,} of {len(rated):,} snippets that people rated between -{_SURE} and {_SURE} left out"
    )
    return [text for text, _ in kept], [(label,) for _, label in kept], [note]


def _take(archive: bytes, name: str) -> bytes:
    """Return one file of a tar, by its exact name, up to a limit."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        member = opened.getmember(name)
        held = opened.extractfile(member)
        if held is None or member.size > _LIMIT:
            raise ValueError(f"{name} is no file of at most {_LIMIT // 2**20} MiB")
        return held.read()
