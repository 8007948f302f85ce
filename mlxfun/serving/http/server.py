"""Uvicorn on a thread of its own, with the socket opened first, so that its errors are ours to word."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from mlxfun.errors import UsageError
from mlxfun.serving.ask import Frame
from mlxfun.serving.options import Address
from mlxfun.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import Route

    from mlxfun.serving.http.app import Desk

INSTALL = "serving needs two packages more: pip install 'mlxfun[serve]'"
HEADER_BYTES = 64 << 10
CONNECTIONS = 1024
BACKLOG = 2048
START_SECONDS = 10.0
GRACE_SECONDS = 5

Delivery = list[tuple[Callable[[Frame], None], Frame]]


class HttpServer:
    """Serves a service until `close`. Raises UsageError: not installed, or the address is taken."""

    def __init__(
        self, service: Service, more: Callable[[Desk], Sequence[Route]] | None = None
    ) -> None:
        try:
            import uvicorn

            from mlxfun.serving.http.app import Desk, make_app
        except ImportError as problem:
            raise UsageError(f"{INSTALL} ({problem})") from None
        self._service = service
        self._socket = _listen(service.options.address)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)
        service.listens_at(self.address)
        self._desk = Desk(service)
        config = uvicorn.Config(
            make_app(self._desk, list(more(self._desk)) if more else []),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlxfun-http", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise UsageError(f"the server at {self.address} did not start")

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()

        def post(frames: Delivery) -> None:
            # RuntimeError: the loop has closed, and nobody listens any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, frames)

        self._service.deliver_with(post)
        loop.call_soon(self._ready.set)
        # Signals belong to the program: uvicorn takes them only on the main thread.
        await self._server.serve(sockets=[self._socket])

    def close(self, seconds: float | None = None) -> bool:
        """Accept nothing more, wait for answers so long (`drain_seconds` by default), and stop;
        whether all answers were complete."""
        given = self._service.options.drain_seconds if seconds is None else seconds
        complete = self._service.stop(given)
        self._server.should_exit = True
        self._thread.join(GRACE_SECONDS + 2)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(1)
        self._desk.close()
        self._socket.close()
        return complete


def _deliver(frames: Delivery) -> None:
    for deliver, frame in frames:
        deliver(frame)


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.host, address.port))
        listening.listen(BACKLOG)
    except OSError as problem:
        listening.close()
        reason = problem.strerror or str(problem)
        raise UsageError(f"cannot serve at {address}: {reason}; choose another port") from None
    return listening
