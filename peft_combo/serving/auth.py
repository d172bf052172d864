"""Who asks, and whether they may: keys, scopes, calls a minute, and the names the service answers to.

Owns the way from a header to a `Caller`. A key is never logged, and neither is what looks like one.
"""

from __future__ import annotations

import time
from hashlib import blake2b

from starlette.datastructures import Headers

from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.limits import RateLimit
from peft_combo.serving.problems import refuse
from peft_combo.serving.state import Caller, Scope, State

ANYBODY = Caller("anybody", frozenset())
_KNOWN_SECONDS = 2.0  # how long a key that was looked up is taken for what it was; then it may have been removed
_MOST_KNOWN = 1000
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Lets a request pass, or raises the refusal."""

    def __init__(self, config: ServiceConfig, state: State) -> None:
        self._state = state
        self._open, self._per_minute = config.open_scopes, config.per_minute
        self._rates = RateLimit(config.workers)
        self._known: dict[bytes, tuple[float, Caller | None]] = {}
        # A page of another origin whose name was made to point here would otherwise read on behalf of who looks at it.
        self._hosts = {*_LOCAL, config.host.lower(), *map(str.lower, config.hosts)} if config.loopback else None

    def check_host(self, headers: Headers) -> None:
        """Refuse a request by a name the service does not go by; asked on loopback alone."""
        if self._hosts is None:
            return
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0] if ":" in host else host
        if name not in self._hosts:
            raise refuse(421, "misdirected", f"Expected {_LOCAL[0]} as the host. Add others with --allow-host.")

    def check(self, headers: Headers, scope: Scope) -> Caller:
        """Return who asks.

        Raises:
            Refusal: no key or a wrong one (401), one without the scope (403), or too many calls (429).
        """
        given = headers.get("authorization")
        if given is None:
            if scope not in self._open:
                detail = f"This needs a key with the scope {scope}: Authorization: Bearer KEY. Make one with: "
                raise refuse(401, "unauthorized", f"{detail}peft-combo serve keys add", www_authenticate="Bearer")
            return ANYBODY
        kind, _, key = given.partition(" ")
        caller = self._find(key.strip()) if kind.lower() == "bearer" else None
        if caller is None:
            if scope in self._open and kind.lower() != "bearer":
                return ANYBODY
            raise refuse(401, "unauthorized", "The key is not known, or was removed.", www_authenticate="Bearer")
        if scope not in caller.scopes and scope not in self._open:
            held = ", ".join(sorted(caller.scopes)) or "none"
            raise refuse(403, "forbidden", f"Expected a key with the scope {scope}, found one with {held}.")
        if wait := self._rates.take(caller.key_id, caller.per_minute or self._per_minute):
            detail = f"The key {caller.name} may call {caller.per_minute or self._per_minute:,} times a minute."
            raise refuse(429, "rate-limited", detail, retry_after=str(int(wait) + 1))
        return caller

    def _find(self, key: str) -> Caller | None:
        """Look a key up, at most every two seconds; the memory of it holds a digest, not the key."""
        digest, now = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(), time.monotonic()
        known = self._known.get(digest)
        if known is not None and now - known[0] < _KNOWN_SECONDS:
            return known[1]
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        caller = self._state.check_key(key)
        self._known[digest] = (now, caller)
        return caller
