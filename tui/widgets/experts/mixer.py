"""The steering mixer panel: a row with a fader for each steered expert, scan report and vector."""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widget import Widget
from textual.widgets import Static
from textual.widgets.option_list import Option

from tui import hints
from tui.keys.keymap import bindings
from tui.state.app_state import AppState
from tui.state.mixer_channels import MOST, VECTOR_MOST, Channel
from tui.text import shortened
from tui.widgets.lists import PanelList
from tui.widgets.panel import Panel

EMPTY = (
    "No expert is steered. Press {mix} on an expert in the map to bring it here, or type "
    "domain-scan or safety-scan for a whole report."
)
HALF = 6
"""Columns on each side of a fader's middle."""
UP, DOWN, DIM = Style(color="green"), Style(color="magenta"), Style(dim=True)


def fader(channel: Channel) -> Text:
    """A channel's fader: forced in is full to the right, forced out full to the left.

    >>> fader(Channel(True, "level", level=6.0)).plain, fader(Channel(True, "out")).plain
    ('······│███···', '██████│······')
    """
    most = VECTOR_MOST if channel.vector else MOST
    reach = {"in": most, "out": -most}.get(channel.way, channel.level) / most
    full = min(HALF, max(1, round(abs(reach) * HALF))) if reach else 0
    text = Text()
    left = full if reach < 0 else 0
    right = full if reach > 0 else 0
    text.append("·" * (HALF - left), DIM)
    text.append("█" * left, DOWN)
    text.append("│")
    text.append("█" * right, UP)
    return text.append("·" * (HALF - right), DIM)


def share(channel: Channel, width: int = 2 * HALF + 1) -> Text:
    """A bar: how many of a report's experts are taken."""
    whole = max(1, channel.named)
    full = round((channel.most or whole) / whole * width)
    return Text.assemble(("█" * full, UP), ("·" * (width - full), DIM))


def row(channel: Channel, width: int) -> Text:
    """One channel in one line."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("● " if channel.on else "○ ", Style(bold=channel.on))
    if channel.path:
        text.append(f"{channel.mode:<9}")
        text.append(share(channel))
        text.append(f" {channel.most or channel.named} of {channel.named}  ")
        # The mode says which kind of scan it was: the file's name comes first.
        kind = f"{channel.kind} " if width - text.cell_len > len(channel.path) + 7 else ""
        text.append(kind)
        text.append(shortened(channel.path, max(4, width - text.cell_len)))
    elif channel.vector:
        text.append(f"layer {channel.layer}".ljust(9))
        text.append(fader(channel))
        text.append(f" {channel.level:+.2f}  vector ")
        text.append(shortened(channel.vector, max(8, width - text.cell_len)))
    else:
        text.append(f"L{channel.layer}:E{channel.expert}".ljust(9))
        text.append(fader(channel))
        said = {"in": " force on", "out": " force off"}
        text.append(said.get(channel.way, f" bias {channel.level:+.1f}"))
    if not channel.on:
        text.stylize(DIM)
    return text


class ChannelList(PanelList, inherit_bindings=False):
    """The rows; the mixer's keys work here."""

    chosen = "mix_toggle"

    BINDINGS: ClassVar[list[BindingType]] = [
        ("down,j", "cursor_down", "down"),
        ("up,k", "cursor_up", "up"),
        ("home", "first", "first"),
        ("end", "last", "last"),
        *bindings("mixer"),
    ]


class MixerPanel(Panel):
    """The panel of steering channels."""

    panel = "mixer"
    title = "steering mixer"
    about = (
        "Every steered expert, scan report and steering vector is a channel. A change takes effect with the "
        "next token, in mid-answer too, and changes no weights.\n\n"
        "{mix} in the map adds the expert under the cursor. {mix_up} and {mix_down} move its fader: "
        "a bias that is added to the router's score, with force on and force off at the ends. "
        "{mix_toggle} mutes or unmutes a channel, {mix_turn} changes its mode (force on, force off, "
        "bias; for a report, its other mode), {mix_remove} removes it. The fader of a report sets "
        "how many of its experts are steered, strongest first. safety-scan and domain-scan make "
        "reports, vector make makes vectors: their fader is the strength with which one is added to "
        "the residual stream of a layer, and {mix_turn} turns its direction round. Several may be on: where two disagree on an expert, the lower one in the list "
        "decides, and a channel of the expert itself overrides both."
    )

    DEFAULT_CSS = """
    MixerPanel #unsteered { height: 1fr; color: $foreground 70%; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[tuple[Channel, ...], bool] | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="unsteered")
        yield ChannelList()

    def wanted(self) -> int:
        return max(6, self.query_one(ChannelList).option_count) + 2

    def entrance(self) -> Widget:
        return self.query_one(ChannelList)

    @property
    def selected(self) -> int | None:
        """The place of the channel under the cursor."""
        return self.query_one(ChannelList).highlighted

    def select(self, place: int) -> None:
        """Move the cursor to a channel."""
        self.query_one(ChannelList).highlighted = place

    def show(self, state: AppState) -> None:
        """Draw the channels of `state`."""
        self.entitle(state.names)
        dense = hints.dense(state)
        if (state.mixer, dense) == self._shown:
            return
        self._shown = state.mixer, dense
        empty = self.query_one("#unsteered", Static)
        empty.display = not state.mixer
        empty.update(
            Text(f"{hints.DENSE.capitalize()} to steer." if dense else state.names.say(EMPTY))
        )
        rows = self.query_one(ChannelList)
        place = rows.highlighted or 0
        rows.clear_options()
        width = max(30, rows.size.width)
        rows.add_options(Option(row(channel, width)) for channel in state.mixer)
        if state.mixer:
            rows.highlighted = min(place, len(state.mixer) - 1)
        on = sum(channel.on for channel in state.mixer)
        self.subtitle(f"{on} of {len(state.mixer)} on" if state.mixer else "")
