"""Character encoding of a text file: UTF-8 and what a byte order mark names are read, others are named with a remedy.

Owns the decision whether bytes are text, and the guess at an encoding where they are not UTF-8. Knows nothing of
tables. A guess is never read: which of several encodings fits is for who knows the language to see.
"""

from __future__ import annotations

import codecs
import re
import shlex
from dataclasses import dataclass

from peft_combo.errors import shorten

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What shops save tables in, as `iconv` spells it; the first of each family is the one Windows writes.
_CANDIDATES = {
    "gb18030": "gb18030", "big5": "big5", "shift_jis": "shift_jis", "euc_jp": "euc-jp", "cp949": "cp949",
    "cp1252": "cp1252", "cp1250": "cp1250", "cp1251": "cp1251", "koi8_r": "koi8-r", "cp1253": "cp1253",
    "cp1254": "cp1254", "cp1255": "cp1255", "cp1256": "cp1256", "cp1258": "cp1258", "cp874": "cp874",
    "mac_roman": "macintosh", "cp437": "cp437",
}  # fmt: skip
_SHOWN = 4
_MULTIBYTE = ("gb18030", "big5", "shift_jis", "euc_jp", "cp949")
_LATIN = ("cp1250", "cp1254", "mac_roman", "cp437", "cp1258")
# Where so many characters are whole UTF-8 for each byte that is not, a text was cut or mixed in; other encodings give
# whole UTF-8 by chance.
_WHOLE_PER_BROKEN = 2
# A guess of charset-normalizer that is more coherent than this is in a language it knows.
_COHERENT = 0.3
# So much of the bytes is looked at for a guess.
_LOOK = 1 << 20
_NOT_TEXT = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself", "Fetch it with: git lfs pull."),
    (b"PK\x03\x04", "is a ZIP archive or an Excel workbook", "Save the sheet as CSV (UTF-8), or unpack the archive."),
    (b"\xd0\xcf\x11\xe0", "is an Excel workbook", "Save the sheet as CSV (UTF-8)."),
    (b"PAR1", "is Parquet", "Name it .parquet."),
    (b"ARROW1", "is an Arrow (Feather) file", "Write it as Parquet."),
    (b"ORC", "is an ORC file", "Write it as Parquet."),
    (b"SQLite format 3", "is an SQLite database", "Write its tables as CSV or Parquet."),
    (b"%PDF", "is a PDF", "Expected a table."),
)


@dataclass(frozen=True)
class Decoded:
    """A text, or why there is none.

    Attributes:
        text: without byte order mark; None where the bytes are no text.
        note: what is to be said of a text that was read.
        line: the first physical line (from 1) that is wrong, where there is no text.
        problem, remedy: of a fault, where there is no text.
    """

    text: str | None
    note: str = ""
    line: int = 1
    problem: str = ""
    remedy: str = ""


def decode(raw: bytes, name: str) -> Decoded:
    """Decode the bytes of a text file.

    Args:
        name: of the file, for the remedy.
    """
    for start, problem, remedy in _NOT_TEXT:
        if raw.startswith(start) and (start != b"ORC" or b"\0" in raw[:64]):
            return Decoded(None, problem=f"{problem}.", remedy=remedy)
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return _decode_marked(raw[len(mark) :], encoding, name)
    wide = _find_wide(raw)
    if wide is not None:
        return Decoded(
            None,
            problem=f"is {wide.upper()} without a byte order mark, expected UTF-8.",
            remedy=f"Convert it: {_iconv(wide.replace('-16-', '-16'), name)}.",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return _explain(raw, error, name)
    lost = text.count("\ufffd")
    note = f"{name} holds {lost:,} characters U+FFFD: they were lost when it was written" if lost else ""
    return Decoded(text, note)


def _decode_marked(raw: bytes, encoding: str, name: str) -> Decoded:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            return _explain(raw, error, name)
        problem = f"says that it is {encoding.upper()}, and is not from byte {error.start + 2:,} on."
        return Decoded(None, problem=problem, remedy="Write the file again.")
    return Decoded(text, "" if encoding == "utf-8" else f"{name} is {encoding.upper()} and was read as that")


def _find_wide(raw: bytes) -> str | None:
    """Return utf-16-le or utf-16-be where every other byte of what looks like ASCII is zero."""
    head = raw[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd < 4:
        return None
    if odd > 4 * even:
        return "utf-16-le"
    return "utf-16-be" if even > 4 * odd else None


def _explain(raw: bytes, error: UnicodeDecodeError, name: str) -> Decoded:
    """Say where bytes stop being UTF-8, and what else they may be."""
    line = raw.count(b"\n", 0, error.start) + 1
    found = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start:,})."
    whole, broken, places = _count_sequences(raw[: max(_LOOK, error.end)])
    if whole >= _WHOLE_PER_BROKEN * broken:
        characters = "one place" if places == 1 else f"{places:,} places"
        return Decoded(
            None,
            line=line,
            problem=f"{found[:-1]}: the file is UTF-8 but for {characters}, where a character is cut or mixed in.",
            remedy="Write that text again; do not convert the whole file.",
        )
    start, end = raw.rfind(b"\n", 0, error.start) + 1, raw.find(b"\n", error.start)
    sample = raw[start : len(raw) if end < 0 else end]
    readings: dict[str, str] = {}
    for encoding in _guess(raw):
        readings.setdefault(shorten(sample.decode(encoding, "replace").strip("\r"), 60), _CANDIDATES[encoding])
    if not readings:
        return Decoded(None, line=line, problem=found, remedy="Save it as UTF-8 in the program it comes from.")
    shown = ", ".join(f"{encoding} gives {reading!r}" for reading, encoding in list(readings.items())[:_SHOWN])
    first, several = next(iter(readings.values())), len(readings) > 1
    choice = "Choose the ENCODING whose line is right" if several else "If that is right"
    first = "ENCODING" if several else first
    return Decoded(None, line=line, problem=f"{found} {shown}.", remedy=f"{choice}: {_iconv(first, name)}.")


def _count_sequences(raw: bytes) -> tuple[int, int, int]:
    """Return how many non-ASCII characters are whole UTF-8, how many bytes are not, and at how many places."""
    decoded = raw.decode("utf-8", "surrogateescape")
    broken = re.findall("[\udc80-\udcff]+", decoded)
    whole = re.findall("[^\x00-\x7f\udc80-\udcff]+", decoded)
    return sum(map(len, whole)), sum(map(len, broken)), len(broken)


def _guess(raw: bytes) -> list[str]:
    """Return the encodings of `_CANDIDATES` that fit, the likeliest first; cp1252 is among them where it fits."""
    import charset_normalizer

    # ASCII says nothing of the encoding, and much of it hides what little there is.
    telling = b"\n".join(line for line in raw[:_LOOK].split(b"\n") if not line.isascii())
    matches = charset_normalizer.from_bytes(telling, cp_isolation=list(_CANDIDATES))
    coherence = {match.encoding: match.coherence for match in matches if match.encoding in _CANDIDATES}
    found = list(coherence)
    # Text of one byte a character seldom happens to be sound where characters have two, unless it is mostly ASCII.
    several = [encoding for encoding in found if encoding in _MULTIBYTE]
    single = max((coherence[encoding] for encoding in found if encoding not in several), default=0.0)
    if several and (single < _COHERENT or max(coherence[encoding] for encoding in several) >= single):
        return [*several, *[encoding for encoding in found if encoding not in several][:1]]
    # Western European text is the most common of all, and a word or two do not show that it is.
    try:
        telling.decode("cp1252")
    except UnicodeDecodeError:
        return found
    first = found[:1] if found[:1] and found[0] not in _LATIN else []
    return list(dict.fromkeys([*first, "cp1252", *found]))


def _iconv(encoding: str, name: str) -> str:
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(name)} > {shlex.quote(f'utf8-{name}')}"
