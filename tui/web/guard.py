"""Who may see and drive the screen in a browser. Pure: the parts of a request in, a refusal out.

A page in a browser can send requests to this machine, and a name that an attacker owns can be made
to point here. So requests for other hosts and from other origins are refused, and without the token
nothing is shown. The token comes once in the address, and then as a cookie that scripts and other
sites do not see.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from mlxfun.serving.options import LOOPBACK, Address
from mlxfun.text import one_line, shown

LONGEST = 40


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says of itself. host, origin: the headers, "" for none. token: of the address;
    cookie: what the browser keeps. socket: whether it opens the connection that drives the screen."""

    host: str
    origin: str = ""
    token: str = ""
    cookie: str = ""
    bearer: str = ""
    socket: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """status: for HTTP; message: one sentence."""

    status: int
    message: str


def refusal(asked: Asked, address: Address, secret: str) -> Refusal | None:
    """Why a request is not answered, None if it is. address: where the server listens."""
    if address.loopback and not _ours(asked.host, address.port):
        return Refusal(403, f"this screen is for this machine, not for {_short(asked.host)}")
    if asked.origin and asked.origin not in origins(asked.host):
        return Refusal(403, f"pages of {_short(asked.origin)} may not drive this screen")
    if asked.socket and not asked.origin:
        return Refusal(403, "the connection must come from the page of this screen")
    if not any(_same(given, secret) for given in (asked.token, asked.cookie, asked.bearer)):
        return Refusal(401, "the token is missing or wrong: open the address that was printed")
    return None


def origins(host: str) -> tuple[str, str]:
    """The origins of pages that a host serves."""
    return f"http://{host}", f"https://{host}"


def _ours(host: str, port: int) -> bool:
    name, colon, number = host.rpartition(":")
    if not colon or number.endswith("]"):  # no port: that of HTTP
        name, number = host, "80"
    return name.removeprefix("[").removesuffix("]") in LOOPBACK and number == str(port)


def _same(given: str, secret: str) -> bool:
    # In time that does not depend on how much of it is right.
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _short(text: str) -> str:
    return one_line(shown(text, LONGEST))


HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""Headers of every answer: no page embeds the screen, and nothing is fetched from elsewhere."""
