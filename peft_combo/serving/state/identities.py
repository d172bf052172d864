"""Identities: user ids as keyed hashes, and the secret that keys them.

Owns the secret's file. Whoever has the state but not the secret cannot tell whose a row is, nor try out ids.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Self

from peft_combo.serving.state.tables import StateError

VARIABLE = "PEFT_COMBO_SECRET"
"""Environment variable of the secret; it goes before the file."""

_FILE = "secret"
_SHORTEST = 16  # characters


class Identities:
    """Turns outside user ids into keys: ``identify("u17")`` is 64 hexadecimal digits, the same for the same secret."""

    def __init__(self, secret: bytes) -> None:
        self._keyed = hmac.new(secret, b"", hashlib.sha256)

    @classmethod
    def open(cls, folder: Path | None) -> Self:
        """Take the secret from the environment, or from the folder, where it is made if there is none.

        Raises:
            StateError: there is neither a secret nor a folder, or it is too short or may be read by others.
        """
        given = os.environ.get(VARIABLE)
        if given is not None:
            if len(given) < _SHORTEST:
                raise StateError(f"{VARIABLE}: expected {_SHORTEST} characters or more, found {len(given)}.")
            return cls(given.encode())
        if folder is None:
            raise StateError(
                f"A state at a URL needs the secret that keys user ids. Set {VARIABLE} to {_SHORTEST} characters or "
                "more, the same in every process."
            )
        return cls(_read_secret(folder / _FILE))

    def identify(self, user_id: str) -> str:
        """Return the key of a user id: HMAC-SHA256 (RFC 2104), in hexadecimal digits."""
        keyed = self._keyed.copy()
        keyed.update(user_id.encode("utf-8", "surrogatepass"))
        return keyed.hexdigest()


def _read_secret(path: Path) -> bytes:
    draft = path.with_name(f"{_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
    with suppress(FileExistsError):
        if not path.exists():
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)  # the first of several workers wins; a rename would replace
            finally:
                draft.unlink()
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise StateError(f"{path} may be read by others. Its owner alone should: chmod 600 {path}")
    secret = path.read_bytes().strip()
    if len(secret) < _SHORTEST:
        raise StateError(f"{path}: expected a secret of {_SHORTEST} characters or more, found {len(secret)}.")
    return secret
