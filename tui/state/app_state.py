"""The state of the screen: frozen data. Nothing here knows a widget.

The arrays are by position of the MoE layer and expert number, [L, E].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlxfun.calibration.reports import DiffReport
from mlxfun.evaluation.reports import ProbeReport
from mlxfun.events import (
    NoticeLevel,
    Progress,
    RoutingFrame,
)
from mlxfun.report import Report
from mlxfun.serving.snapshot import ServingReport
from mlxfun.session.reports import SessionView
from tui.keys.key_labels import USUAL, KeyNames
from tui.keys.keymap import PanelName
from tui.state.chat_turns import Turn
from tui.state.mixer_channels import Channel
from tui.state.sizes import BALANCED, Sizes

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from tui.ports import Row

LOG_LIMIT = 200
FULL_STEERING = "steer --clear"
"""How a line begins that replaces all steering: of several in a row the log keeps the last."""
PROBE_LINE = "probe --tokens 512"
"""The one command line that the screen sends by itself; its result is not logged."""


Level = Literal[NoticeLevel, "ok", "error"]
"""The levels of messages."""
Shape = Literal["map", "layer", "table"]
"""How the experts are shown."""
Scale = Literal["auto", "linear", "log", "rank"]
"""How scores become colours; "auto" takes one of the others by how skewed they are."""
HeatFlag = Literal["per_layer", "fit", "sort"]
"""Options of the heatmap that are on or off, see HeatOptions."""


@dataclass(frozen=True, slots=True)
class Job:
    """A running job. started: the clock, in seconds, when it began."""

    id: int
    line: str
    started: float
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Options of the chat field. None: the shell's default.

    both: base and candidate are asked; revise: how many turns the next text takes back first.
    """

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    thinking: bool | None = None
    both: bool = False
    revise: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log. line: the command line, if any."""

    level: Level
    line: str
    text: str
    report: Report | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Offer:
    """Something found that can be brought back. line: the command line for it, "" for none here.
    about: the model that it is of, "" for any."""

    text: str
    line: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class HeatOptions:
    """How the heatmap is drawn.

    metric: None for the first available of a list. scale, per_layer: of the colours. fit: pool experts to the
    width, else pan. shape: the map, the layer under the cursor (a line per expert), or a table.
    sort: each layer's experts by score.
    """

    metric: str | None = None
    scale: Scale = "auto"
    per_layer: bool = True
    fit: bool = True
    shape: Shape = "map"
    sort: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A selection of experts to prune that is not staged yet.

    pruned: bool [L, E]; since: the clock at the last change; sent: its command line is queued.
    """

    pruned: Array
    since: float
    sent: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AppState:
    """Everything the screen shows.

    view, rows: the session and its commands after the last job.
    names: what the keys are called, in every sentence.
    jobs: what runs, the innermost last: a replay runs its lines as jobs inside its own.
    queued: (job, line) of those that wait.
    frame: the running calibration's newest heat.
    held: int8 [L, E], where the experts are while a job runs (see mlxfun.events.ON_DISK); None where
        `view` says it.
    traffic: float64 [L, E], how many tokens of the newest answer each expert served.
    lit: int32 [L, K], the experts of the newest token while one is generated, or of the token under
        the transcript's cursor. When both sides answer, traffic and lit are those of the live side.
    turns: the conversation. log: the newest `LOG_LIMIT` entries. echo: what the echo line shows.
    lines: the command lines that succeeded.
    heat: how the heatmap is drawn.
    cursor: (position of the MoE layer, expert). anchor: the other corner of a range.
    draft: a selection of experts that is not staged yet.
    picked: the selections before the changes of the present one, bool [L, E], the newest last.
    probe: the newest quick measurement. probed: the state of the plan that was probed last, or "-"
        where plans cannot be probed.
    talk: the chat's options. token: (job, index) of the token under the transcript's cursor.
    brush: whether the tokens that the expert under the cursor served are tinted.
    mixer: the channels of the steering mixer. mixing: its newest command line.
    compared: the last two files of statistics that were compared.
    limits: the guardrails that are set. marked: the history node that others are compared with.
    panel: the focused one. beside: the last focused or revealed that is not the heatmap.
    upper: the plan or the mixer, whichever was last. front: the last of all, for terminals with
        room for one panel. unseen: panels with an outcome that has not been shown yet.
    saved: the states of weights that were written to disk.
    unkept: the statistics in hand are in no file. recording: the file that is recorded to, "" for
        none. offers: what was found at the start and is neither taken nor declined.
    zoomed: whether the focused panel fills the screen. sizes: of the panels, where it does not.
    serving: what the server beside the screen did a moment ago. spotlight: the request whose experts
        light up the map, None for those of all.
    """

    view: SessionView = field(default_factory=SessionView)
    rows: tuple[Row, ...] = ()
    names: KeyNames = USUAL
    jobs: tuple[Job, ...] = ()
    queued: tuple[tuple[int, str], ...] = ()
    frame: RoutingFrame | None = None
    held: Array | None = None
    traffic: Array | None = None
    lit: Array | None = None
    turns: tuple[Turn, ...] = ()
    log: tuple[Entry, ...] = ()
    echo: Entry | None = None
    lines: tuple[str, ...] = ()
    heat: HeatOptions = HeatOptions()
    cursor: tuple[int, int] = (0, 0)
    anchor: tuple[int, int] | None = None
    draft: Draft | None = None
    picked: tuple[Array, ...] = ()
    probe: ProbeReport | None = None
    probed: str = ""
    talk: ChatOptions = ChatOptions()
    token: tuple[int, int] | None = None
    brush: bool = False
    mixer: tuple[Channel, ...] = ()
    mixing: str = ""
    compared: DiffReport | None = None
    limits: tuple[tuple[str, float], ...] = ()
    marked: int | None = None
    panel: PanelName = "experts"
    beside: PanelName = "chat"
    upper: PanelName = "plan"
    front: PanelName = "experts"
    unseen: frozenset[PanelName] = frozenset()
    saved: frozenset[str] = frozenset()
    unkept: bool = False
    recording: str = ""
    offers: tuple[Offer, ...] = ()
    zoomed: bool = False
    sizes: Sizes = BALANCED
    serving: ServingReport | None = None
    spotlight: int | None = None

    @property
    def job(self) -> Job | None:
        """The innermost running job, None if none runs."""
        return self.jobs[-1] if self.jobs else None

    @property
    def offer(self) -> Offer | None:
        """The newest offer, None once it is being taken."""
        taken = {*(job.line for job in self.jobs), *(line for _, line in self.queued)}
        return next((o for o in reversed(self.offers) if not o.line or o.line not in taken), None)

    def last_line(self, name: str) -> str | None:
        """The newest command line that began with `name` and succeeded."""
        return next((ln for ln in reversed(self.lines) if ln.split(None, 1)[0] == name), None)

    def row(self, name: str) -> Row | None:
        """The command called `name`, as the engine last declared it."""
        return next((row for row in self.rows if row.name == name), None)
