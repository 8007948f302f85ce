"""HTTP routes that run commands or read the shell's state, beside those of the model's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlxfun.serving.service import Service

if TYPE_CHECKING:
    from starlette.routing import Route

    from commands.engine import Engine
    from mlxfun.serving.http.app import Desk


def routes(engine: Engine, service: Service) -> Callable[[Desk], Sequence[Route]]:
    """The routes, once there is a desk. Only then Starlette is imported."""

    def found(desk: Desk) -> Sequence[Route]:
        from commands.routes.counting import Counting
        from commands.routes.runner import Runner
        from commands.routes.shell import Shell

        runner = Runner(engine)
        return [*Counting(runner, service, desk).routes(), *Shell(runner, desk).routes()]

    return found
