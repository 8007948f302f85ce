"""Options of serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlxfun.errors import UsageError

OnEdit = Literal["drain", "abort"]
"""What becomes of requests in flight when an edit is due: they end first, or are broken off."""

CountMode = Literal["off", "lightweight", "full"]
"""What is counted of the traffic: nothing, how often experts are selected, or all statistics."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEFAULT_PORT = 8080


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens. port: 0 for one that is free."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST:PORT, HOST, :PORT, PORT or [IPv6]:PORT. Raises UsageError.

        >>> Address.parse("8081"), Address.parse("[::1]:80").host
        (Address(host='127.0.0.1', port=8081), '::1')
        """
        host, colon, port = text.rpartition(":")
        if not colon and text.isdecimal():
            host, port = "", text
        elif not colon or text.endswith("]") or (text.count(":") > 1 and "]" not in text):
            host, port = text, str(DEFAULT_PORT)
        if not (port.isascii() and port.isdecimal() and int(port[:6]) < 1 << 16):
            raise UsageError(f"{text!r} is no address to serve at: give HOST:PORT, or a port alone")
        host = host.removeprefix("[").removesuffix("]") or cls().host
        bare = text == host and host.isidentifier() and host != "localhost"  # a model, rather
        if bare or any(c.isspace() or c == "/" for c in host):
            raise UsageError(f"{text!r} is no address to serve at: give HOST:PORT, or a port alone")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Serving. token: what clients must show, None for nothing. origins: web pages that may ask.

    max_tokens: of an answer where the request does not say. max_input_tokens: of a prompt, None for
    the model's own limit. concurrency: requests in flight at most; waiting: accepted beyond that.
    cache_bytes: what caches of prompts may hold. body_bytes: the longest request. commands: whether
    POST /v1/mlxfun/commands runs commands. drain_seconds: how long a stop waits for answers.
    Raises UsageError for impossible numbers, and for a public address without a token.
    """

    address: Address = Address()
    token: str | None = None
    origins: tuple[str, ...] = ()
    on_edit: OnEdit = "drain"
    max_tokens: int = 512
    max_input_tokens: int | None = None
    concurrency: int = 16
    waiting: int = 256
    cache_bytes: int = 2 << 30
    body_bytes: int = 32 << 20
    commands: bool = False
    drain_seconds: float = 30.0
    output_root: Path | None = None
    count: CountMode = "off"
    auto_save: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "waiting", "body_bytes"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {getattr(self, name)} must be at least 1")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise UsageError("--token must consist of printable ASCII characters")
        if self.token == "":
            raise UsageError("--token is empty: leave it out, or give a secret")
        if not self.address.loopback and self.token is None:
            raise UsageError(
                f"{self.address.host} can be reached from other machines: give --token SECRET, or "
                "serve at 127.0.0.1"
            )
        if self.commands and self.token is None:
            raise UsageError("--allow-commands lets clients edit the model: give --token SECRET")
        if self.commands and self.output_root is None:
            raise UsageError(
                "--allow-commands needs --output-root DIR: clients write below it only"
            )
