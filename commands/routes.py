"""Routes that run commands or read the shell's state, beside those of the model's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlxfun.serving.service import Service

if TYPE_CHECKING:
    from starlette.routing import Route

    from commands.engine import Engine
    from mlxfun.serving.http.app import Desk


def routes(_engine: Engine, _service: Service) -> Callable[[Desk], Sequence[Route]]:
    """The routes, once there is a desk."""

    def found(_desk: Desk) -> Sequence[Route]:
        return []

    return found
