"""API keys: made once, stored hashed, compared in constant time.

A key reads `pc_ID_SECRET`. The id finds the row, the secret opens it; neither log nor database ever holds the secret.
A secret of 256 random bits needs no slow hash: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_PATTERN = re.compile(r"pc_([0-9a-f]{12})_([0-9A-Za-z_-]{43})")
_NOBODY = hashlib.sha256(b"nobody").hexdigest()


def make_key() -> tuple[str, str, str]:
    """Return a new key's id, its hash, and the key itself, which is shown once."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return key_id, _hash(secret), f"pc_{key_id}_{secret}"


def parse_key(key: str) -> tuple[str, str] | None:
    """Return id and secret of a key, or None where it does not read like one."""
    match = _PATTERN.fullmatch(key)
    return None if match is None else (match[1], match[2])


def match_secret(secret: str, stored: str | None) -> bool:
    """Say whether a secret has this hash; takes as long where there is no such key."""
    return hmac.compare_digest(_hash(secret), stored or _NOBODY) and stored is not None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
