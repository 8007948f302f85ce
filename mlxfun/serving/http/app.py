"""The routes, and what they have in common: reading a body, wording what goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlxfun.serving.http.answers import client_of, respond
from mlxfun.serving.http.apis.chat import Endpoint, OpenAIWording, chat_turn, text_turn
from mlxfun.serving.http.apis.messages import AnthropicWording, count, messages_turn
from mlxfun.serving.http.apis.responses import ResponsesWording, responses_turn
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields, parse
from mlxfun.serving.http.guard import Guard, body_of, error_response
from mlxfun.serving.http.metrics import exposition
from mlxfun.serving.http.several import respond_several
from mlxfun.serving.http.tickets import Gone
from mlxfun.serving.service import NO_MODEL, Card, Service

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Desk:
    """What handlers work with. Prompts are read on a thread of their own, one after the other, so
    that a long one holds up neither the model nor the other clients."""

    def __init__(self, service: Service) -> None:
        self.service, self.options = service, service.options
        self._reader = ThreadPoolExecutor(1, "mlxfun-prompts")

    def card(self) -> Card:
        """The resident model. Raises Bad without one."""
        card = self.service.card
        if card is None:
            raise Bad(NO_MODEL, status=503)
        return card

    async def fields(self, request: Request, empty: bool = False) -> Fields:
        """The fields of a body. Raises Bad. empty: whether there may be none at all."""
        body = await body_of(request, self.options.body_bytes)
        if empty and not body.strip():
            return Fields({})
        return Fields(await self.aside(parse, body))

    async def aside(self, work: Callable[..., T], *given: Any) -> T:
        """Do some work on the thread that reads prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *given)

    def close(self) -> None:
        """End that thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def make_app(desk: Desk, more: list[Route]) -> ASGIApp:
    """The application. more: routes beside those of OpenAI."""
    routes = [
        Route("/health", guarded(partial(_health, desk)), methods=["GET"]),
        Route("/metrics", guarded(partial(_metrics, desk)), methods=["GET"]),
        Route("/v1/models", guarded(partial(_models, desk)), methods=["GET"]),
        Route("/v1/models/{name:path}", guarded(partial(_model, desk)), methods=["GET"]),
        Route("/v1/chat/completions", guarded(partial(_complete, desk, "chat")), methods=["POST"]),
        Route("/v1/messages", guarded(partial(_message, desk)), methods=["POST"]),
        Route("/v1/messages/count_tokens", guarded(partial(_count, desk)), methods=["POST"]),
        Route("/v1/responses", guarded(partial(_response, desk)), methods=["POST"]),
        Route("/v1/completions", guarded(partial(_complete, desk, "text")), methods=["POST"]),
        *more,
    ]
    handlers: dict[Any, Any] = {HTTPException: _no_route}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = desk.service
    return Guard(app, desk.options, partial(_refused, desk.service))


def _refused(service: Service, request: Request, problem: Bad) -> None:
    service.refused(client_of(request), problem.status, problem.message)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def guarded(handler: Handler) -> Handler:
    """A handler whose refusals are worded, and whose mistakes are one sentence."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Bad as problem:
            _refused(_service(request), request, problem)
            return error_response(request.url.path, problem)
        except Gone:
            return Response(None, 499)
        except Exception as problem:
            # A mistake of ours must not show its traceback to strangers, or end the connection.
            log.exception("a request to %s failed", request.url.path)
            what = f"the server failed at this request: {type(problem).__name__}"
            _service(request).refused(client_of(request), 500, what)
            return error_response(request.url.path, Bad(what, status=500))

    return handle


async def _no_route(request: Request, problem: Exception) -> Response:
    status = problem.status_code if isinstance(problem, HTTPException) else 500
    path = request.url.path[:200]
    what = f"the request cannot be answered: {path}"
    if status == 404:
        what = f"there is nothing at {path}"
    elif status == 405:
        allowed = (getattr(problem, "headers", None) or {}).get("Allow", "another method")
        what = f"{path} does not take {request.method}; use {allowed}"
    return error_response(request.url.path, Bad(what, status=status))


async def _health(desk: Desk, _request: Request) -> Response:
    card = desk.service.card
    ready = card is not None and not desk.service.stopping
    body = {"status": "ok" if ready else "unavailable", "model": card.model if card else None}
    return JSONResponse(body, 200 if ready else 503)


async def _metrics(desk: Desk, _request: Request) -> Response:
    text = exposition(desk.service.figures())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _models(desk: Desk, _request: Request) -> Response:
    card = desk.card()
    listed = [model_json(card, card.model)]
    if len(card.sides) > 1:
        listed += [model_json(card, side) for side, _ in card.sides]
    # "models" is what Codex reads.
    return JSONResponse({"object": "list", "data": listed, "models": listed})


async def _model(desk: Desk, request: Request) -> Response:
    card, name = desk.card(), request.path_params["name"]
    if name == card.model or name in dict(card.sides):
        return JSONResponse(model_json(card, name))
    raise Bad(f"there is no model {name[:100]} here, only {card.model}", "model", 404)


def model_json(card: Card, name: str) -> dict[str, Any]:
    """A model as OpenAI's clients list it."""
    states: dict[str, str] = dict(card.sides)
    return {
        "id": name,
        "object": "model",
        "created": card.loaded,
        "owned_by": "mlxfun",
        "max_model_len": card.context,
        "mlxfun": {"state": states.get(name, states.get(card.live, card.state))},
    }


async def _message(desk: Desk, request: Request) -> Response:
    card, fields = desk.card(), await desk.fields(request)
    turn = await desk.aside(messages_turn, fields, card, desk.options)
    wording = AnthropicWording(turn, card, fields)
    return await respond(request, desk.service, turn, wording, fields.switch("stream"))


async def _count(desk: Desk, request: Request) -> Response:
    card, fields = desk.card(), await desk.fields(request)
    return JSONResponse({"input_tokens": await desk.aside(count, fields, card)})


async def _response(desk: Desk, request: Request) -> Response:
    card, fields = desk.card(), await desk.fields(request)
    turn = await desk.aside(responses_turn, fields, card, desk.options)
    wording = ResponsesWording(turn, card, fields)
    return await respond(request, desk.service, turn, wording, fields.switch("stream"))


async def _complete(desk: Desk, endpoint: Endpoint, request: Request) -> Response:
    card, fields = desk.card(), await desk.fields(request)
    read = chat_turn if endpoint == "chat" else text_turn
    turn = await desk.aside(read, fields, card, desk.options)
    wording = OpenAIWording(endpoint, turn, card, fields)
    return await respond_several(request, desk.service, turn, wording, fields.switch("stream"))
