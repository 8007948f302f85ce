"""The Textual application: owns the state and the engine, and connects one to the other.

Events come from the worker through an `EventQueue`, are folded into the state, and the state is
drawn. Messages come from the widgets and become command lines for the engine or changes of the
state. What single keys do is in tui.interaction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual import constants, on
from textual.binding import Binding, BindingType
from textual.filter import LineFilter

from commands.conditions import comparable
from commands.config import Config
from mlxfun.editing.reports import StepReport
from mlxfun.events import Event, JobEnded
from mlxfun.report import Report
from tui import hints, themes
from tui.command_history import LineHistory
from tui.config_check import check_config
from tui.event_queue import EventQueue
from tui.input import actions, chat_actions, expert_selection
from tui.interaction.chatting import ChatKeys
from tui.interaction.forms import FormKeys
from tui.interaction.layouts import LayoutKeys
from tui.interaction.navigation import NavigationKeys
from tui.interaction.picking import ExpertKeys
from tui.interaction.reading import ReadingKeys
from tui.interaction.serving import ServingKeys
from tui.interaction.windows import Windows
from tui.keys.key_labels import KeyNames
from tui.keys.keymap import BY_ID, Key, PanelName
from tui.layout import PANELS, arrange
from tui.layout_file import LayoutFile
from tui.messages import (
    CellClicked,
    ChatEntered,
    EventsWaiting,
    ExpertClicked,
    KeyUsed,
    LineEntered,
    MessageRaised,
    PanelChosen,
    TextPasted,
)
from tui.notification import notification
from tui.palette import Commands, Item
from tui.ports import Engine
from tui.screen import MainScreen
from tui.screen_filter import VisibleText
from tui.state.app_state import AppState
from tui.state.chat_turns import quoted
from tui.state.reducer import reduce
from tui.state.sizes import read

FRAMES_PER_SECOND, REMOTE_FRAMES_PER_SECOND = 12, 4
LONG_JOB = 10.0
DEFAULT_CONFIG = Config()
VISIBLE = VisibleText()


def plain_report(report: Report) -> RenderableType:
    """A report as its one sentence, without markup."""
    return Text(report.summary())


IN_BAND_OFF = "\x1b[?2048l\x1b[?1016l"
"""Turns off resize reports in the input, and mouse positions in pixels."""


def without_pixels() -> None:
    """Keep the mouse in cells, unless the user asks for smooth scrolling.

    Where a terminal reports its size in the input, Textual takes all mouse positions for pixels
    from the first resize on. Terminals and multiplexers that send cells all the same, or a size of
    0 x 0 pixels, have no mouse from then on. Nothing here scrolls by parts of a cell.
    """
    if "TEXTUAL_SMOOTH_SCROLL" not in os.environ:
        vars(constants)["SMOOTH_SCROLL"] = False


class ShellApp(
    NavigationKeys, ExpertKeys, ChatKeys, FormKeys, LayoutKeys, ReadingKeys, ServingKeys, Windows
):
    """The full screen on one engine.

    engine: runs the commands. startup_lines: queued after the first paint. renderer: makes a
    report readable. lines: earlier command lines; the layout is kept beside them. clock: seconds,
    monotonic. config: the user's.
    """

    TITLE = "mlxfun"
    COMMANDS: ClassVar = {Commands}
    # Textual's own, which work over every screen, under the ids by which users rename them.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(BY_ID[id].keys, action, show=False, priority=True, id=id)
        for id, action in (("quit", "quit"), ("palette", "command_palette"))
    ]
    CSS = """
    * {
        scrollbar-color: $foreground 25%;
        scrollbar-color-hover: $foreground 40%;
        scrollbar-color-active: $accent;
        scrollbar-background: $background;
        scrollbar-background-hover: $background;
        scrollbar-background-active: $background;
        scrollbar-corner-color: $background;
    }
    CommandPalette > Vertical { max-width: 100; }
    """

    def __init__(
        self,
        engine: Engine,
        *,
        startup_lines: Sequence[str] = (),
        renderer: Callable[[Report], RenderableType] = plain_report,
        lines: LineHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
        config: Config = DEFAULT_CONFIG,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.state = AppState(names=KeyNames.of(config.keys))
        self._startup_lines = tuple(startup_lines)
        self._lines = lines or LineHistory(None)
        self._layout_file = LayoutFile(self._lines.beside("layout.json"))
        self._clock = clock
        self._frame_seconds = 1 / (config.refresh_rate or FRAMES_PER_SECOND)
        self._events = EventQueue(self._wake)
        for theme in themes.THEMES:
            self.register_theme(theme)
        self.theme = config.theme or themes.DARK.name
        self.ansi_theme_dark, self.ansi_theme_light = themes.ON_DARK, themes.ON_LIGHT
        self.set_keymap(self.state.names.bindings())
        self.main = MainScreen(
            engine.complete, self._lines.load(), renderer, lambda key: self._use(BY_ID[key])
        )
        self._asked: dict[int, PanelName] = {}
        self._counting = 0

    # Life -------------------------------------------------------------------------------------
    def get_default_screen(self) -> MainScreen:
        return self.main

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), VISIBLE]

    def on_mount(self) -> None:
        self.state = replace(
            self.state,
            rows=tuple(self.engine.rows()),
            view=self.engine.view(),
            recording=str(self.engine.recording or ""),
            sizes=read(self._layout_file.load()),
        )
        self.engine.subscribe(self._events.push)
        if self._driver is not None and not constants.SMOOTH_SCROLL:
            # Another program may have left it on.
            self._driver.write(IN_BAND_OFF)
        self.call_after_refresh(self._started)

    def _started(self) -> None:
        self._show()
        self.engine.offer()
        # Only now that something is drawn: loading imports MLX, which takes a while.
        for line in self._startup_lines:
            self.engine.run(line)
        self.set_interval(self._frame_seconds, self.pump)

    def on_resize(self) -> None:
        # After the screen has laid itself out for the new size.
        self.call_after_refresh(self._show)

    def _wake(self) -> None:
        # Runs on the worker's thread: posting is all it may do, and it is thread-safe.
        self.post_message(EventsWaiting())

    @on(EventsWaiting)
    def _woken(self) -> None:
        self.pump()

    def pump(self) -> None:
        """Fold the worker's events into the state and draw it."""
        events = self._events.drain()
        for event in events:
            self._take(event)
        settled, looked = self._settle(), self._look()
        if events or settled or looked or self.state.job is not None:
            self._show()

    def _take(self, event: Event) -> None:
        if isinstance(event, JobEnded):
            view, rows = self.engine.view(), tuple(self.engine.rows())
            before = self.state.view
            self.state = replace(self.state, view=view, rows=rows)
            self.state = expert_selection.after_job(self.state, before, event.line)
            self.state = actions.put(self.state, *self.state.cursor)
        self.state = reduce(self.state, event, self._clock())
        if isinstance(event, JobEnded):
            self._remix(event)
            self._after_job(event)
            if self.state.talk.both and comparable(self.state.view):
                # There is nothing to compare any more: the next question goes to the live model.
                self.state = replace(self.state, talk=replace(self.state.talk, both=False))

    def _after_job(self, event: JobEnded) -> None:
        """After a job: show the panel with its outcome, and notify of long jobs."""
        asked_from = self._asked.pop(event.job, None)
        if event.job in (self._opened, self._typed):
            self._open(event)
        panel = actions.panel_for(event)
        if panel is not None and not self._first_load(event):
            self._show_outcome(event, panel, asked_from)
        if event.report is not None and event.report.kind == "quit":
            self.leave()
        failed = event.error is not None and not event.cancelled
        if (
            not self._form_again(event)
            and failed
            and event.job == self._typed
            and not self.main.command.input.value
        ):
            # A line that was mistyped or refused is offered for correction.
            self.main.command.give_back(event.line, focus=event.usage)
        if event.seconds >= LONG_JOB and not event.cancelled:
            self._notify(event)

    def _show_outcome(
        self, event: JobEnded, panel: PanelName, asked_from: PanelName | None
    ) -> None:
        """Bring the panel with the outcome into view, or mark its tab where it would replace the one
        that the user is working in."""
        aside = isinstance(event.report, StepReport) or event.line.startswith("select")
        shown = actions.reveal(self.state, panel, aside=aside)
        focused = self.main.focused_panel
        visible = arrange(self.size.width, self.size.height, shown).visible
        elsewhere = asked_from not in (None, focused)
        if focused in PANELS and focused not in visible and (self.main.in_field or elsewhere):
            shown = actions.mark_unseen(self.state, panel)
        self.state = shown

    def _first_load(self, event: JobEnded) -> bool:
        """Whether this loaded the model that the shell was started with."""
        return event.line in self._startup_lines and event.line.startswith("load ")

    def _notify(self, event: JobEnded) -> None:
        """Ring the bell and send a desktop notification."""
        self.bell()  # a toast would cover the command line
        text = event.report.summary() if event.report else (event.error or "failed")
        if self._driver is not None:
            self._driver.write(notification(event.line, text))

    def _show(self) -> None:
        if self.is_running and self.main.is_mounted:  # the timer may tick once more at the end
            self.main.show(self.state, self._clock())

    # Messages of the widgets ------------------------------------------------------------------
    @on(LineEntered)
    def _line_entered(self, message: LineEntered) -> None:
        self.enter_line(message.line)

    def enter_line(self, line: str) -> None:
        """Run a line that the user entered, unless something has to be asked before."""
        self._lines.add(line)
        if not self._asks_before(line):
            self._typed = self._run(line)

    @on(ChatEntered)
    def _chat_entered(self, message: ChatEntered) -> None:
        line = chat_actions.line_for(self.state, message.text)
        self.state = replace(self.state, talk=replace(self.state.talk, revise=0))
        self._run(line)

    @on(TextPasted)
    def _text_pasted(self, message: TextPasted) -> None:
        words = ["tokens", *chat_actions.options(self.state.talk), quoted(message.text)]
        self._counting = self.engine.run(" ".join(words))

    @on(CellClicked)
    def _cell_clicked(self, message: CellClicked) -> None:
        self._change(actions.point(self.state, message.position, message.expert))

    @on(ExpertClicked)
    def _expert_clicked(self, message: ExpertClicked) -> None:
        self._change(
            actions.put(replace(self.state, anchor=None), self.state.cursor[0], message.expert)
        )

    @on(PanelChosen)
    def _panel_chosen(self, message: PanelChosen) -> None:
        self._change(actions.pick_panel(self.state, message.panel))
        if message.move:
            self.main.focus_panel(message.panel)

    @on(MessageRaised)
    def _message_raised(self, message: MessageRaised) -> None:
        self._say(message.level, message.text)

    @on(KeyUsed)
    def _key_used(self, message: KeyUsed) -> None:
        self._use(BY_ID[message.key])

    def choose(self, item: Item) -> None:
        """An entry of the palette: run it, or offer its command line for finishing."""
        key = BY_ID[item.key] if item.key is not None else None
        if item.reason:
            self._say("warning", f"{key.label if key else item.command}: {item.reason}")
        elif item.command == "load":
            self.enter_line("load")  # lists what there is
        elif key is not None and key.kind == "fill":
            line = hints.command_line(self.state, key, self.main.selected_node)
            if not self.open_form(line):
                self.main.command.fill(line)
        elif key is not None:
            self._use(key)
        elif not self.open_form(item.command):
            self.main.command.fill(f"{item.command} ")

    # Keys -------------------------------------------------------------------------------------
    def _use(self, key: Key) -> None:
        if key.id == "undo" and expert_selection.undoable(self.state):
            self._pick("undo")
            return
        reason = hints.why_not(self.state, key)
        if reason:
            self._say("warning", f"{key.label}: {reason}")
            return
        if key.kind == "do":
            self._do(key.target)
            return
        line = hints.command_line(self.state, key, self.main.selected_node)
        if key.kind == "run":
            job = self._run(line)
            if key.id == "dossier":
                self._opened = job
        else:
            self.main.command.fill(line)

    def _do(self, target: str) -> None:
        """Carry out an action of the screen: a verb and its arguments, as in the keymap."""
        verb, *arguments = target.split()
        verbs = {**self._navigation_verbs(), **self._expert_verbs(), **self._chat_verbs(),
                 **self._form_verbs(), **self._layout_verbs(),
                 **self._reading_verbs(), **self._serving_verbs()}  # fmt: skip
        verbs[verb](*arguments)


def full_report(report: Report) -> RenderableType:
    """A report as the commands render it; imported with the first, so that the first paint waits less."""
    from commands.output.render.dispatch import render

    return render(report)


def application(
    engine: Engine,
    *,
    startup_lines: Sequence[str] = (),
    renderer: Callable[[Report], RenderableType] = full_report,
    lines_file: Path | None = None,
    config: Config = DEFAULT_CONFIG,
) -> ShellApp:
    """The application. Raises UsageError for themes and keys that there are not.

    startup_lines: command lines to run after the first paint. lines_file: where command lines are
    remembered between sessions, the layout beside it; the user's state directory when None.
    """
    # Every frame of a heatmap is kilobytes: a remote terminal gets fewer.
    rate = REMOTE_FRAMES_PER_SECOND if "SSH_CONNECTION" in os.environ else FRAMES_PER_SECOND
    check_config(config)
    without_pixels()
    return ShellApp(
        engine,
        startup_lines=startup_lines,
        renderer=renderer,
        lines=LineHistory(lines_file or LineHistory.default_path()),
        config=replace(config, refresh_rate=config.refresh_rate or rate),
    )


def run(engine: Engine, **given: Any) -> int:
    """Show the shell until the user leaves; returns the exit code. given: see `application`.

    On return the running job is cancelled and the terminal is restored; closing the engine is the
    caller's part.
    """
    app = application(engine, **given)
    code = app.run()
    return app.return_code or code or 0
