"""The panel of the server beside the screen: requests, clients, what went wrong."""

from __future__ import annotations

from time import localtime, strftime
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widget import Widget
from textual.widgets import Static
from textual.widgets.option_list import Option

from mlxfun.serving.snapshot import ClientLine, Problem, RequestLine, ServingReport
from mlxfun.text import counted
from tui.keys.keymap import bindings
from tui.state.app_state import AppState
from tui.state.serving import requests
from tui.text import harmless, shortened
from tui.widgets.lists import PanelList
from tui.widgets.panel import Panel

DIM, BOLD, WARN, BAD = Style(dim=True), Style(bold=True), Style(color="yellow"), Style(color="red")
NONE = "Nothing is served. Start with mlxfun-shell MODEL --serve."
IDLE = "No request is in flight."
CLIENTS, PROBLEMS = 6, 4
WITH_CACHE = 56
"""Columns from which on a request's cached tokens are told."""
NAME = 14
DOING = {"open": Style(color="green"), "paused": WARN, "draining": WARN, "stopped": BAD}


def head(report: ServingReport) -> Text:
    """Address and totals, in two lines."""
    text, figures = Text(no_wrap=True, overflow="ellipsis"), report.figures
    text.append(f"{report.doing} ", DOING[report.doing])
    text.append(f"http://{report.address}/v1", BOLD)
    text.append(f"  {report.rate:.0f} tokens/s\n")
    text.append(f"{figures.in_flight} in flight, {figures.waiting} waiting, ")
    return text.append(f"{report.cached_share:.0%} of prompts cached")


def request_line(one: RequestLine, lit: bool, width: int) -> Text:
    """A request in one line. lit: whether it is the one that the map lights up by."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("◆ " if lit else "  ", BOLD)
    name = "chat" if one.id < 0 else str(one.id)
    text.append(f"{name:>4} ", DIM)
    text.append(f"{shortened(harmless(one.client), NAME):<{NAME}} ")
    if one.waiting:
        return text.append(f"waiting {one.seconds:.0f} s", WARN)
    text.append(f"{one.rate:5.1f}/s {one.generated:>5}")
    if width >= WITH_CACHE:
        share = one.cached / one.prompt if one.prompt else 0.0
        text.append(f"  cached {share:4.0%} of {one.prompt:,}", DIM)
    if one.side == "candidate" or one.steered:
        text.append(" candidate" if one.side == "candidate" else " steered", WARN)
    return text


def client_line(client: ClientLine) -> Text:
    """What a client has had so far, in one line."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{shortened(harmless(client.name), NAME):<{NAME}} ")
    text.append(counted(client.requests, "request", "requests"))
    if client.failed:
        text.append(f", {client.failed} failed", BAD)
    share = client.cached / client.prompt if client.prompt else 0.0
    text.append(f", {client.generated:,} tokens")
    return text.append(f", {share:.0%} cached", DIM)


def problem_line(problem: Problem) -> Text:
    """What went wrong, in one line."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{strftime('%H:%M:%S', localtime(problem.at))} {problem.status} ", BAD)
    return text.append(f"{harmless(problem.client)}: {harmless(problem.message)}")


def totals(report: ServingReport) -> Text:
    """Clients, and below them what went wrong last."""
    lines = [client_line(client) for client in report.clients[:CLIENTS]]
    left = len(report.clients) - CLIENTS
    lines += [Text(f"and {left} clients more", DIM)] if left > 0 else []
    lines += [problem_line(problem) for problem in report.problems[:PROBLEMS]]
    return Text("\n").join(lines)


class RequestList(PanelList, inherit_bindings=False):
    """The requests; the panel's keys work here."""

    chosen = "spotlight"

    BINDINGS: ClassVar[list[BindingType]] = [
        ("down,j", "cursor_down", "down"),
        ("up,k", "cursor_up", "up"),
        ("home,g", "first", "first"),
        ("end,G", "last", "last"),
        *bindings("serve"),
    ]


class ServePanel(Panel):
    """The server."""

    panel = "serve"
    title = "serving"
    about = (
        "The server that was started with --serve: its address, the requests in flight with the "
        "speed of each and the share of its prompt that came from the cache, what each client has "
        "had so far, and what went wrong last. The chat of this shell is one of the requests.\n\n"
        "The map lights up by the experts of all requests; {spotlight} on a request lights it up by "
        "that one alone, and again by all. {serve_pause} lets new requests wait, or go on; "
        "{serve_drain} refuses new ones and completes the others; {serve_stop} offers the command "
        "that closes the server. The shell goes on."
    )

    DEFAULT_CSS = """
    ServePanel #server { height: 2; }
    ServePanel #totals { height: auto; max-height: 40%; }
    ServePanel #server, ServePanel RequestList, ServePanel #totals {
        text-wrap: nowrap; text-overflow: ellipsis;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[ServingReport | None, int | None, int] | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="server")
        yield RequestList()
        yield Static(id="totals")

    def entrance(self) -> Widget:
        return self.query_one(RequestList)

    @property
    def selected(self) -> int | None:
        """The request under the cursor."""
        option = self.query_one(RequestList).highlighted_option
        return int(option.id) if option is not None and option.id else None

    def show(self, state: AppState) -> None:
        """Draw the newest picture of the server."""
        self.entitle(state.names)
        now = (state.serving, state.spotlight, self.size.width)
        if not self.display or now == self._shown:
            return
        self._shown = now
        report = state.serving
        self.query_one("#server", Static).update(Text(NONE) if report is None else head(report))
        self.query_one("#totals", Static).update(Text() if report is None else totals(report))
        self._list(state)

    def _list(self, state: AppState) -> None:
        shown, rows = requests(state), self.query_one(RequestList)
        selected, place = self.selected, rows.highlighted
        rows.clear_options()
        if not shown:
            rows.add_option(Option(Text(IDLE, DIM), disabled=True))
            return
        width = self.size.width
        rows.add_options(
            Option(request_line(one, one.id == state.spotlight, width), id=str(one.id))
            for one in shown
        )
        numbers = [one.id for one in shown]
        if selected in numbers:
            rows.highlighted = numbers.index(selected)
        else:
            rows.highlighted = min(place or 0, len(numbers) - 1)
