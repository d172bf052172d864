"""Download of public datasets into a cache folder, checked by sha256.

Owns the addresses, the checksums and the lock file beside the data. Knows nothing of what is in the files. Where the
sha256 of a file is known it is pinned here. Where it is not, the first download is trusted and its sha256 written to
the lock; from then on the file must match it.
"""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peft_combo.errors import DataError, did_you_mean
from peft_combo.files import atomic_file, literal_path, write_text

LOCK = "peft-combo.lock.json"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """One file of a dataset; `sha256` is None where nobody could vouch for one."""

    name: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Remote:
    """A public dataset: what it is, on what terms, and the files it takes."""

    name: str
    what: str
    terms: str
    files: tuple[RemoteFile, ...]


def _describe_bundlerec(category: str, titles_sha256: str, categories_sha256: str) -> Remote:
    """Return the files of one BundleRec category, each at a fixed commit."""
    root = "https://raw.githubusercontent.com/BundleRec/bundle_recommendation"
    behaviour = "0964176882723725781c56012ba3c028ccf2796d"
    files = [
        RemoteFile(
            "item_titles.csv",
            f"{root}/dfabe7bd74b0051911998a3f108a59e1745f6b75/dataset/{category}/item_titles.csv",
            titles_sha256,
        ),
        RemoteFile(
            "item_categories.csv",
            f"{root}/b29a34a81e326e56451cda8af28429da957dc83d/dataset/{category}/item_categories.csv",
            categories_sha256,
        ),
    ]
    files += [
        RemoteFile(name, f"{root}/{behaviour}/dataset/{category}/{name}")
        for name in ("bundle_item.csv", "bundle_intent.csv", "user_bundle.csv", "user_item.csv")
    ]
    return Remote(
        f"bundlerec-{category}",
        f"bundles of Amazon items with intents, {category} (Sun et al., SIGIR 2022)",
        "no licence stated: for research, not to be passed on",
        tuple(files),
    )


REMOTE = (
    _describe_bundlerec(
        "clothing",
        "4719a0d21d7a9072c726299781f4d9ee6504f00932f7b748141a8c3c44388a07",
        "1a62964575d3d0a87ef2e4b8a0de1c6ce45b649ee27d139512b3de5ffedc24a3",
    ),
    _describe_bundlerec(
        "electronic",
        "8d77a35db7527bd87f0a8fb4630e5412446d15140ad4210b5a28a738dc274ae1",
        "04a0cdb5b5567b0c0c18e22a29a38f77718ff9770281c3f0672a3c57ddcc4d25",
    ),
)


def get(name: str, cache_dir: str | Path) -> Path:
    """Download the public dataset `name` under `cache_dir` and return its folder; what is there already is kept.

    Raises:
        DataError: there is no such dataset, the network cannot be reached, or a file is not what it was.
    """
    for remote in REMOTE:
        if remote.name == name:
            return fetch(remote, cache_dir)
    names = [remote.name for remote in REMOTE]
    raise DataError(
        f"No dataset {name!r} to get. There are {', '.join(names)}. {did_you_mean(name, names)} "
        "The sources demo and completejourney need no download."
    )


def fetch(remote: Remote, cache_dir: str | Path, timeout: float = 30.0) -> Path:
    """Put every file of `remote` into a folder of its own under `cache_dir`, and check each.

    A file that is there already, placed by hand or by an earlier run, is checked and kept. A new one is written beside
    its place, checked, then moved there: a file under its own name is whole.

    Args:
        timeout: seconds without an answer after which a host counts as out of reach.
    Raises:
        DataError: a file cannot be had or does not match its checksum.
    """
    folder = literal_path(cache_dir) / remote.name
    folder.mkdir(parents=True, exist_ok=True)
    locked = _read_lock(folder / LOCK)
    for file in remote.files:
        target = folder / file.name
        expected = file.sha256 or locked.get(file.name)
        if target.is_file():
            found = _hash_file(target)
            if expected is not None and found != expected:
                raise DataError(
                    f"{target} is not the file it was: expected sha256 {expected}, found {found}. "
                    "Remove it and get it again."
                )
        else:
            found = _download(remote, file, target, expected, timeout)
        if locked.get(file.name) != found:
            locked[file.name] = found
            _write_lock(folder / LOCK, locked)
    return folder


def _download(remote: Remote, file: RemoteFile, target: Path, expected: str | None, timeout: float) -> str:
    """Download one file, check it, and give it its name; return its sha256."""
    # Here, and not above: it brings requests, which takes a tenth of a second to import.
    from pooch import HTTPDownloader  # type: ignore[import-untyped]
    from requests import RequestException

    get_file = HTTPDownloader(chunk_size=_CHUNK, timeout=timeout, headers={"User-Agent": "peft-combo"})
    with atomic_file(target) as part:
        hashed = _Hashed(part)
        try:
            get_file(file.url, hashed, None)
        except OSError as error:
            if not isinstance(error, RequestException):
                raise DataError(f"{target} cannot be written: {error.strerror or error}.") from error
            if error.response is not None:
                error.response.close()  # it holds the connection
            raise DataError(_explain_out_of_reach(remote, file, target.parent, error)) from error
        digest = hashed.sha256.hexdigest()
        if expected is not None and digest != expected:
            raise DataError(
                f"{file.url} did not give the expected file: expected sha256 {expected}, found {digest}. Nothing was "
                f"kept. Either the file was changed at its source, or something in between altered it. If you trust "
                f"another copy, place it as {target}"
                + (f", and remove {target.parent / LOCK}." if file.sha256 is None else ".")
            )
    return digest


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _explain_out_of_reach(remote: Remote, file: RemoteFile, folder: Path, error: Exception) -> str:
    host = urllib.parse.urlsplit(file.url).netloc
    cause: BaseException = error
    while inner := cause.__cause__ or cause.__context__:  # urllib3 and requests each wrap what the system said
        cause = inner
    reason = getattr(cause, "strerror", None) or cause
    missing = [one for one in remote.files if not (folder / one.name).is_file()]
    listed = "\n".join(f"  {one.url}" for one in missing)
    return (
        f"Cannot get {file.name} from {host}: {reason}. Check the network, or get these files elsewhere and place them "
        f"in {folder}:\n{listed}"
    )


def _hash_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_lock(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    try:
        content = json.loads(lock.read_text("utf-8"))
        return {str(name): str(digest) for name, digest in content["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{lock} cannot be read: {error}. Remove it to trust the files beside it as they are."
        ) from error


def _write_lock(lock: Path, digests: dict[str, str]) -> None:
    write_text(lock, json.dumps({"sha256": dict(sorted(digests.items()))}, indent=2) + "\n")
