"""The endpoints of mlx_fun's server, with its bodies and answers: statistics of the traffic, and
steering. Layers are positions among the MoE layers there."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from commands.routes.runner import Runner
from mlxfun.errors import MlxfunError
from mlxfun.serving.ask import Levels
from mlxfun.serving.counts import info_json, stats_json, steering_json
from mlxfun.serving.http.app import Desk, guarded
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields, quoted
from mlxfun.serving.service import Card, Refused, Service

DEFAULT_FILE = "reap_saliency.npz"
ALWAYS = 1e4
"""mlx_fun adds 1e4 and -1e9 by default: as good as always and never, which is this shell's rule."""


class Counting:
    """GET stats and info, POST save and reset, and steer below /v1/reap."""

    def __init__(self, runner: Runner, service: Service, desk: Desk) -> None:
        self._runner, self._service, self._desk = runner, service, desk

    def routes(self) -> list[Route]:
        """All of them."""
        table = (
            ("stats", "GET", self._stats),
            ("info", "GET", self._info),
            ("save", "POST", self._save),
            ("reset", "POST", self._reset),
            ("steer", "GET", self._steering),
            ("steer", "POST", self._steer),
            ("steer", "DELETE", self._unsteer),
        )
        return [
            Route(f"/v1/reap/{name}", guarded(handler), methods=[method])
            for name, method, handler in table
        ]

    async def _stats(self, _request: Request) -> Response:
        return JSONResponse(await self._read(stats_json))

    async def _info(self, _request: Request) -> Response:
        return JSONResponse(await self._read(info_json))

    async def _save(self, request: Request) -> Response:
        fields = await self._desk.fields(request, empty=True)
        given = fields.text("path", DEFAULT_FILE, 4096) or DEFAULT_FILE
        path = self._confined(given)
        await self._read(lambda model: model.save_stats(path))
        return JSONResponse({"status": "saved", "path": given})

    async def _reset(self, _request: Request) -> Response:
        await self._read(lambda model: model.reset_stats())
        return JSONResponse({"status": "reset"})

    async def _steering(self, _request: Request) -> Response:
        active, config = await self._read(steering_json)
        return JSONResponse({"active": True, "config": config} if active else {"active": False})

    async def _steer(self, request: Request) -> Response:
        fields, card = await self._desk.fields(request, empty=True), self._desk.card()
        await self._runner.must(self._line(fields, card))
        _, config = await self._read(steering_json)
        return JSONResponse({"status": "steering_updated", "config": config})

    async def _unsteer(self, _request: Request) -> Response:
        await self._runner.must("steer --clear")
        return JSONResponse({"status": "steering_removed"})

    def _line(self, fields: Fields, card: Card) -> str:
        """The command line for a body. Raises Bad."""
        for kind, modes in (("safety", ("safe", "unsafe")), ("domain", ("boost", "suppress"))):
            if f"{kind}_map" in fields:
                path = self._confined(str(fields.text(f"{kind}_map")))
                mode = fields.choice("mode", modes, modes[0])
                words = ["steer", "--clear", "--ancestor-modes", f"--{kind}-map", str(path)]
                return shlex.join([*words, f"--{kind}-mode", mode])
        words = ["steer", "--clear"]
        for name in ("activate", "deactivate"):
            experts = by_position(fields, name, card)
            if experts:
                words += [f"--{name}", ",".join(f"{ly}:{e}" for ly, some in experts for e in some)]
        boost = fields.number("boost_value", 0, 1e300, ALWAYS)
        mask = fields.number("mask_value", -1e300, 0, -ALWAYS)
        if 0 < boost < ALWAYS or -ALWAYS < mask < 0:
            words += ["--rule", "additive"]
            words += ["--boost-value", f"{min(boost, ALWAYS)!r}"] if boost else []
            words += [f"--mask-value={max(mask, -ALWAYS)!r}"] if mask else []
        return shlex.join(words)

    def _confined(self, given: str) -> Path:
        """A path that a client may name. Raises Bad for others."""
        root = (self._desk.options.output_root or Path.cwd()).resolve()
        try:
            path = (root / given).resolve()
        except (OSError, ValueError):
            path = root
        if path == root or not path.is_relative_to(root):
            raise Bad(f"{quoted(given)} lies outside {root}, where clients may name files", "path")
        return path

    async def _read(self, work: Any) -> Any:
        """Have something done on the model's thread. Raises Bad."""
        if not self._desk.card().experts:
            raise Bad("the model is dense: it has no experts to count or steer", status=409)
        try:
            return await asyncio.wrap_future(self._service.call(work))
        except Refused as problem:
            raise Bad(str(problem), status=problem.status) from None
        except MlxfunError as problem:
            raise Bad(str(problem), status=409) from None


def by_position(fields: Fields, name: str, card: Card) -> Levels:
    """Experts by decoder layer, of {"position": [experts]}. Raises Bad."""
    table = fields.table(name)
    if table is None:
        return ()
    found = []
    for word, experts in table.values.items():
        place = int(word) if word.isascii() and word.isdecimal() and len(word) < 9 else -1
        if not 0 <= place < len(card.layers):
            raise Bad(
                f"{name}: {quoted(word)} is no layer; the MoE layers are 0 to "
                f"{len(card.layers) - 1}",
                name,
            )
        good = isinstance(experts, list) and all(type(e) is int for e in experts)
        if not good or not all(0 <= e < card.experts for e in experts):
            raise Bad(f"{name}: layer {place} has experts 0 to {card.experts - 1}", name)
        if experts:
            found.append((card.layers[place], tuple(sorted(set(experts)))))
    return tuple(found)
