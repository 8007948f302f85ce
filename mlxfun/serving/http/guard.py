"""The door: who may ask, and how much at once. Everything is checked before a route is looked up."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxfun.serving.http.errors import Bad, anthropic_error, openai_error
from mlxfun.serving.http.fields import quoted
from mlxfun.serving.options import LOOPBACK, ServeOptions

log = logging.getLogger(__name__)

BODY_SECONDS = 30.0
"""A body that takes longer to arrive is not waited for."""

OPEN = ("/health",)
"""What needs no token: whether the server is up is no secret."""


class Guard:
    """Checks host, origin and token of every request, and adds CORS headers for named origins.

    A page in a browser can send requests to this machine, though not read the answers; and a name
    that an attacker owns can be made to point here. So a request that names another origin or, at
    loopback without a token, another host is refused. refused: told of each refusal: the request,
    and why.
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, refused: Callable[[Request, Bad], None]
    ) -> None:
        self._app, self._options, self._refused = app, options, refused
        self._token = options.token.encode() if options.token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check_host(headers.get("host", ""))
            self._check_origin(origin)
            if scope["method"] == "OPTIONS" and origin is not None:
                await Response(None, 204, self._cors(origin))(scope, receive, send)
                return
            if scope["path"] not in OPEN:
                self._check_token(headers)
        except Bad as problem:
            self._refused(Request(scope), problem)
            await error_response(scope["path"], problem)(scope, receive, send)
            return
        if origin is None:
            await self._app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in self._cors(origin).items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self._app(scope, receive, sending)

    def _check_host(self, host: str) -> None:
        if self._token is not None or not self._options.address.loopback:
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name.removeprefix("[").removesuffix("]") not in LOOPBACK:
            raise Bad(f"this server is for this machine, not for the host {quoted(host)}", "", 403)

    def _check_origin(self, origin: str | None) -> None:
        if origin is not None and origin not in self._options.origins:
            raise Bad(
                f"pages of {quoted(origin)} may not ask here; start with --allow-origin to let "
                "them",
                "",
                403,
            )

    def _check_token(self, headers: Headers) -> None:
        if self._token is None:
            return
        given = headers.get("authorization", "")
        scheme, _, value = given.partition(" ")
        shown = value if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Both in time that does not depend on how much of it is right.
        if not hmac.compare_digest(shown.strip().encode("utf-8", "replace"), self._token):
            raise Bad("the token is missing or wrong: send Authorization: Bearer TOKEN", "", 401)

    def _cors(self, origin: str) -> dict[str, str]:
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "*, authorization",
            "access-control-expose-headers": "x-mlxfun-state, x-mlxfun-side, x-mlxfun-steering",
            "vary": "origin",
        }


async def body_of(request: Request, most: int) -> bytes:
    """The body, at most `most` bytes. Raises Bad: too long, too slow, cut short."""
    said = request.headers.get("content-length", "")
    too_long = Bad(f"the body has more than {most:,} bytes", "", 413)
    if said.isdecimal() and (len(said) > 18 or int(said) > most):
        raise too_long
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                found += chunk
                if len(found) > most:
                    raise too_long
    except TimeoutError:
        raise Bad(f"the body did not arrive within {BODY_SECONDS:g} seconds", "", 408) from None
    except ClientDisconnect:
        raise Bad("the client went away", "", 400) from None
    return bytes(found)


def error_response(path: str, problem: Bad) -> JSONResponse:
    """A refusal in the words of the API that was asked."""
    if path.startswith("/v1/messages"):
        body = anthropic_error(problem.status, problem.message)
    else:
        body = openai_error(problem.status, problem.message, problem.param)
    headers = {"www-authenticate": "Bearer"} if problem.status == 401 else {}
    return JSONResponse(body, problem.status, headers)
