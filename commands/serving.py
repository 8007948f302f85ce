"""Serving from the shell: the options of the program, and the server beside a front end.

Only the standard library and Click are imported at the top, so that --help is instant.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from commands import streams
from commands.declare import count_option
from mlxfun.errors import StateError, UsageError
from mlxfun.serving.options import Address, CountMode, OnEdit, ServeOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from commands.engine import Engine
    from commands.workbench.wiring import ServeAction
    from mlxfun.serving.http.server import HttpServer
    from mlxfun.serving.service import Service
    from mlxfun.serving.snapshot import Doing, ServingReport

MAP = click.Path(path_type=Path, dir_okay=False)
AT_LOOPBACK = str(Address())

_OPTIONS = (
    click.option(
        "--serve",
        is_flag=False,
        flag_value=AT_LOOPBACK,
        metavar="[HOST:PORT]",
        help=f"Serve the model to OpenAI and Anthropic clients (default: {AT_LOOPBACK}).",
    ),
    click.option(
        "--token",
        envvar="MLXFUN_TOKEN",
        metavar="SECRET",
        help="With --serve or --web: what clients must show; also taken from MLXFUN_TOKEN.",
    ),
    click.option(
        "--allow-origin",
        "origins",
        multiple=True,
        metavar="URL",
        help="With --serve: web pages that may ask. Repeatable.",
    ),
    click.option(
        "--allow-commands", is_flag=True, help="With --serve and --token: clients may edit."
    ),
    click.option(
        "--on-edit",
        type=click.Choice(get_args(OnEdit)),
        default="drain",
        help="With --serve: before an edit, answers end first (drain) or are broken off (abort).",
    ),
    count_option(
        "--max-tokens", "With --serve: length of an answer where a request does not say", 512
    ),
    count_option(
        "--max-input-tokens",
        "With --serve: longest prompt (default: what the model was made for).",
    ),
    count_option("--concurrency", "With --serve: answers at once", 16),
    click.option(
        "--prompt-cache-bytes",
        default="2GiB",
        metavar="SIZE",
        help="With --serve: what caches of prompts may hold (default: 2GiB).",
    ),
    click.option(
        "--mode",
        "count",
        type=click.Choice([mode for mode in get_args(CountMode) if mode != "off"]),
        help="With --serve: count routing; full also measures the experts' outputs.",
    ),
    click.option(
        "--auto-save",
        type=MAP,
        metavar="FILE",
        help="With --serve --mode: write the statistics here at the end.",
    ),
    click.option("--safety-map", type=MAP, metavar="FILE", help="With --serve: steer by it."),
    click.option(
        "--steering-mode", type=click.Choice(["safe", "unsafe"]), help="How --safety-map steers."
    ),
    click.option("--domain-map", type=MAP, metavar="FILE", help="With --serve: steer by it."),
    click.option(
        "--domain-steering-mode",
        type=click.Choice(["boost", "suppress"]),
        help="How --domain-map steers.",
    ),
)

_NAMES = (
    "serve", "token", "origins", "allow_commands", "on_edit", "max_tokens", "max_input_tokens",
    "concurrency", "prompt_cache_bytes", "count", "auto_save", "safety_map", "steering_mode",
    "domain_map", "domain_steering_mode",
)  # fmt: skip


def serve_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of serving to the program."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def of_mlx_fun(words: list[str]) -> list[str] | None:
    """The words of this program for mlx_fun's `serve`; None where the words are no such command.

    >>> of_mlx_fun(["serve", "--model", "demo", "--port=81", "--max-tokens", "9"])
    ['--headless', '--serve', '127.0.0.1:81', '--mode', 'lightweight', '--max-tokens', '9', 'demo']
    """
    if "serve" not in words[:2] or words[0].startswith("-"):
        return None
    rest = iter(words[1:] if words[0] == "serve" else ["--model", words[0], *words[2:]])
    taken = {"--model": "", "--host": Address().host, "--port": str(Address().port)}
    passed: list[str] = []
    for word in rest:
        name, equals, value = word.partition("=")
        if name in taken:
            taken[name] = value if equals else next(rest, "")
        else:
            passed.append(word)
    host = f"[{taken['--host']}]" if ":" in taken["--host"] else taken["--host"]
    counted = any(word.partition("=")[0] == "--mode" for word in passed)
    mode = [] if counted else ["--mode", "lightweight"]
    model = [taken["--model"]] if taken["--model"] else []
    return ["--headless", "--serve", f"{host}:{taken['--port']}", *mode, *passed, *model]


@dataclass(frozen=True, slots=True)
class Serve:
    """What the command line asks for. lines: command lines to run once the model is loaded."""

    options: ServeOptions
    lines: tuple[str, ...] = ()


def taken(
    given: dict[str, Any], context: click.Context | None = None, also: tuple[str, ...] = ()
) -> Serve | None:
    """The serving options out of `given`, None without --serve. Raises click.UsageError.

    also: names of options that have another use.
    """
    context = context or click.get_current_context()
    values = {name: given.pop(name) for name in _NAMES}
    if values["serve"] is None:
        for name in _NAMES:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE" and name not in also:
                flag = next(p for p in context.command.params if p.name == name).opts[0]
                raise click.UsageError(f"{flag} needs --serve")
        return None
    try:
        return Serve(_serve_options(values, given.get("output_root")), _lines(values))
    except UsageError as problem:
        raise click.UsageError(str(problem)) from None


def _serve_options(values: dict[str, Any], output_root: Path | None) -> ServeOptions:
    from commands.types import Size

    try:
        cache = Size.parse(values["prompt_cache_bytes"])
    except ValueError as problem:
        raise UsageError(f"--prompt-cache-bytes: {problem}") from None
    if values["auto_save"] is not None and values["count"] is None:
        raise UsageError("--auto-save needs --mode lightweight or full: nothing is counted")
    return ServeOptions(
        address=Address.parse(values["serve"]),
        token=values["token"] or None,
        origins=tuple(origin.rstrip("/") for origin in values["origins"]),
        on_edit=values["on_edit"],
        max_tokens=values["max_tokens"],
        max_input_tokens=values["max_input_tokens"],
        concurrency=values["concurrency"],
        cache_bytes=cache,
        commands=values["allow_commands"],
        output_root=output_root,
        count=values["count"] or "off",
        auto_save=values["auto_save"],
    )


def _lines(values: dict[str, Any]) -> tuple[str, ...]:
    """Command lines for what mlx_fun's `serve` has options for, in the meaning they have there."""
    words: list[str] = []
    for kind, mode in (("safety", "steering_mode"), ("domain", "domain_steering_mode")):
        path = values[f"{kind}_map"]
        if path is None and values[mode] is not None:
            flag = mode.replace("_", "-")
            raise UsageError(f"--{flag} needs --{kind}-map")
        if path is not None:
            words += [f"--{kind}-map", str(path)]
            words += [f"--{kind}-mode", values[mode]] if values[mode] is not None else []
    return (shlex.join(["steer", "--ancestor-modes", *words]),) if words else ()


class Running:
    """See commands.workbench.wiring.Server."""

    def __init__(self, service: Service, server: HttpServer) -> None:
        self._service, self._server = service, server

    @property
    def address(self) -> str:
        return str(self._server.address)

    def snapshot(self) -> ServingReport:
        return self._service.snapshot()

    def act(self, action: ServeAction) -> ServingReport:
        if action == "show":
            return self.snapshot()
        if self._service.doing == "stopped":
            raise StateError("the server has stopped; start the program anew to serve again")
        after: dict[ServeAction, Doing] = {"pause": "paused", "resume": "open"}
        self._service.doing = after.get(action, "draining")
        if action == "stop":
            # It waits for answers, and so for the model's thread, on which this may run. It sets
            # "stopped" at its end, so nothing is set behind it here.
            threading.Thread(target=self._stop, name="mlxfun-stop", daemon=True).start()
        return self.snapshot()

    def _stop(self) -> None:
        self._server.close()
        self._service.doing = "stopped"


@contextmanager
def beside(engine: Engine, serve: Serve | None) -> Iterator[None]:
    """Serve inside the block; at its end answers are completed first. Raises UsageError."""
    if serve is None:
        yield
        return
    from commands.routes import routes
    from mlxfun.serving.http.server import HttpServer
    from mlxfun.serving.service import Service

    service = Service(serve.options)
    engine.serve(service)
    server = HttpServer(service, routes(engine, service))
    engine.served_by(Running(service, server))
    streams.say(f"serving at http://{server.address}/v1")
    try:
        yield
    finally:
        figures = service.figures()
        open_ = figures.in_flight + figures.waiting
        if open_:
            streams.say(f"completing {open_} answers; interrupt to break them off")
        try:
            complete = server.close()
        except KeyboardInterrupt:
            complete = server.close(0)
        if not complete:
            streams.say("answers were broken off")


def wait() -> None:
    """Serve until a signal comes: raises KeyboardInterrupt, or Terminated."""
    threading.Event().wait()
