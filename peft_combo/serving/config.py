"""Configuration of the service: every setting with its default and bounds, stated once.

Options of the command line become this; workers are handed it as JSON. Knows nothing of what is done with it.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_combo.errors import PeftComboError, shorten
from peft_combo.serving.state.rows import Scope


class ServiceConfig(BaseModel):
    """Settings of `peft-combo serve`. What engine and batching read of it is `service.EngineConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="Name of a shipped recipe, or a YAML file.")
    overrides: tuple[str, ...] = Field(default=(), description="Overrides of recipe keys, as in data.path=shop.")
    data: Path | None = Field(default=None, description="Folder of data, in place of the recipe's.")
    store: Path | None = Field(default=None, description="Folder of the adapter store; None takes the recipe's.")
    adapters: tuple[str, ...] = Field(default=(), description="Aliases that are served, the first by default.")
    follow: Literal["watch", "told", "fixed"] = Field(
        default="told", description="Who moves an alias: the store, a promotion, nobody."
    )
    encoder: Literal["torch", "onnx", "int8", "pruned"] = Field(
        default="torch", description="Form of the encoder."
    )  # fmt: skip
    vectors: Path = Field(default=Path("vectors"), description="Folder of the vector cache.")
    fitted: Path = Field(default=Path("fitted"), description="Folder of fitted recommenders.")

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8765, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(default=1, ge=1, le=64, description="Processes that answer.")
    state: str = Field(default="state", min_length=1, description="Folder or database URL of the state.")
    open: frozenset[Scope] | None = Field(
        default=None, description="Scopes that need no key; None: read and write on loopback, none elsewhere."
    )
    hosts: tuple[str, ...] = Field(default=(), description="Further names under which clients may call.")
    tls_cert: Path | None = Field(default=None, description="Certificate chain, PEM.")
    tls_key: Path | None = Field(default=None, description="Key of the certificate, PEM.")
    access_log: bool = Field(default=False, description="A line for every request, without ids of users.")

    batch_ms: float = Field(default=2.0, ge=0, le=1000, description="How long a text waits for others, ms.")
    batch_texts: int = Field(default=32, ge=1, le=4096, description="Texts encoded together.")
    queue_texts: int = Field(default=512, ge=1, description="Texts that may wait.")
    encode_timeout: float = Field(default=10.0, gt=0, description="Seconds an encode may take, waiting included.")
    text_chars: int = Field(default=10_000, ge=1, description="Longest text, characters.")
    poll_ms: float = Field(default=200.0, ge=10, description="How often state and store are looked at, ms.")
    cached_queries: int = Field(default=10_000, ge=0, description="Query vectors kept.")

    threads: int = Field(default=8, ge=1, le=256, description="Threads that answer, per process.")
    queue: int = Field(default=64, ge=1, description="Requests that may be under way or wait, per process.")
    timeout: float = Field(default=15.0, gt=0, description="Seconds an answer may take, waiting included.")
    body_bytes: int = Field(default=1 << 20, ge=1024, description="Largest body.")
    batch_bytes: int = Field(default=32 << 20, ge=1024, description="Largest body of a batch of items.")
    body_seconds: float = Field(default=10.0, gt=0, description="Seconds a body may take to arrive.")
    connections: int = Field(default=1000, ge=1, description="Connections at a time, per process.")
    per_minute: int = Field(default=60_000, ge=1, description="Requests a minute of one key, over all processes.")
    grace: float = Field(default=10.0, ge=0, description="Seconds for requests under way when the service ends.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can call."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def open_scopes(self) -> frozenset[Scope]:
        """Scopes that need no key."""
        if self.open is not None:
            return self.open
        return frozenset({"read", "write"}) if self.loopback else frozenset()


def make_config(values: dict[str, Any]) -> ServiceConfig:
    """Check settings.

    Raises:
        PeftComboError: a value is none it may have, or two do not go together.
    """
    try:
        config = ServiceConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise PeftComboError(f"--{name}: {first['msg']}, found {shorten(str(first['input']))}.") from error
    if (config.tls_cert is None) != (config.tls_key is None):
        raise PeftComboError("--tls-cert FILE and --tls-key FILE go together: a certificate and its key.")
    return config
