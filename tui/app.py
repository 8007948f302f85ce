"""The Textual application: owns the state and the engine, and connects one to the other.

Events come from the worker through a `Feed`, are folded into the state, and the state is shown.
Intents come from the widgets and become command lines for the engine or changes of the state.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType

from commands.config import Config
from mlxfun.editing.reports import StepReport
from mlxfun.events import Event, JobEnded
from mlxfun.report import Report
from mlxfun.scans.reports import DossierReport
from tui import hints, themes
from tui.command_history import LineHistory
from tui.config_check import check_config
from tui.event_queue import Feed
from tui.input import actions, chat_actions, expert_selection
from tui.input.interaction import Hands
from tui.input.key_labels import Names
from tui.input.keymap import BY_ID, Key
from tui.layout import PANELS, arrange
from tui.messages import (
    CursorPut,
    ExpertPut,
    KeyUsed,
    LineEntered,
    PanelPicked,
    Remarked,
    Said,
    Wake,
)
from tui.notification import notification
from tui.palette import Commands, Item
from tui.ports import Engine
from tui.screen import MainScreen
from tui.state import AppState, reduce
from tui.widgets.experts.expert_profile import dossier_page
from tui.widgets.help import HelpScreen, help_page, topic

FRAMES_PER_SECOND = 12
REMOTE_FRAMES_PER_SECOND = 4
DOUBLE_ESCAPE = 1.5
PARTING = 5.0
"""Seconds in which the key that leaves is taken for the answer to what would be lost."""
LONG_JOB = 10.0
USUAL = Config()


def plain_report(report: Report) -> RenderableType:
    """A report as its one sentence, never read as markup."""
    return Text(report.summary())


class ShellApp(Hands):
    """engine: runs the commands. startup_lines: queued after the first paint. renderer: makes a
    report readable. lines: earlier command lines. clock: seconds, monotonic. config: the user's."""

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
        config: Config = USUAL,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.state = AppState(names=Names.of(config.keys))
        self._startup_lines = tuple(startup_lines)
        self._lines = lines or LineHistory(None)
        self._clock = clock
        self._frame_seconds = 1 / (config.refresh_rate or FRAMES_PER_SECOND)
        self._feed = Feed(self._wake)
        for theme in themes.THEMES:
            self.register_theme(theme)
        self.theme = config.theme or themes.DARK.name
        self.ansi_theme_dark, self.ansi_theme_light = themes.ON_DARK, themes.ON_LIGHT
        self.set_keymap(self.state.names.bindings())
        self.main = MainScreen(
            engine.complete, self._lines.load(), renderer, lambda key: self._use(BY_ID[key])
        )
        self._escaped = self._parting = float("-inf")
        self._asked: dict[int, str] = {}
        self._typed = 0
        self._opened = 0

    # Life -------------------------------------------------------------------------------------
    def get_default_screen(self) -> MainScreen:
        return self.main

    def on_mount(self) -> None:
        self.state = replace(self.state, rows=tuple(self.engine.rows()), view=self.engine.view())
        self.engine.subscribe(self._feed.push)
        self.call_after_refresh(self._started)

    def _started(self) -> None:
        self._show()
        # Only now that something is on screen: loading imports MLX, which takes a while.
        for line in self._startup_lines:
            self.engine.run(line)
        self.set_interval(self._frame_seconds, self.pump)

    def on_resize(self) -> None:
        # After the screen has laid itself out for the new size.
        self.call_after_refresh(self._show)

    def _wake(self) -> None:
        # Runs on the worker's thread: posting is all it may do, and it is thread-safe.
        self.post_message(Wake())

    @on(Wake)
    def _woken(self) -> None:
        self.pump()

    def pump(self) -> None:
        """Fold what the worker sent into the state and show it."""
        events = self._feed.drain()
        for event in events:
            self._take(event)
        settled = self._settle()
        if events or settled or self.state.job is not None:
            self._show()

    def _take(self, event: Event) -> None:
        if isinstance(event, JobEnded):
            view, rows = self.engine.view(), tuple(self.engine.rows())
            before = self.state.view
            self.state = replace(self.state, view=view, rows=rows)
            self.state = expert_selection.overtaken(self.state, before, event.line)
            self.state = actions.put(self.state, *self.state.cursor)
        self.state = reduce(self.state, event, self._clock())
        if isinstance(event, JobEnded):
            self._remix(event)
            self._over(event)
            if self.state.talk.both and hints.nothing_to_compare(self.state):
                # The last question to both has been asked; the next one goes to the model.
                self.state = replace(self.state, talk=replace(self.state.talk, both=False))

    def _over(self, event: JobEnded) -> None:
        """A job has ended: show where its outcome is, call back whoever turned away."""
        asked_from = self._asked.pop(event.job, None)
        if isinstance(event.report, DossierReport) and event.job == self._opened:
            self.push_screen(HelpScreen(dossier_page(event.report, self.state)))
        panel = actions.news(event)
        if panel is not None and not self._first_load(event):
            self._tell(event, panel, asked_from)
        if event.report is not None and event.report.kind == "quit":
            self.leave()
        if event.usage and event.job == self._typed and not self.main.command.input.value:
            # A slip of the fingers is corrected, not typed again.
            self.main.command.give_back(event.line)
        if event.seconds >= LONG_JOB and not event.cancelled:
            self._announce(event)

    def _tell(self, event: JobEnded, panel: str, asked_from: str | None) -> None:
        """Bring the panel with the outcome into view, unless that would take away the one in which
        a person is at work: then a mark on its tab has to do."""
        aside = isinstance(event.report, StepReport) or event.line.startswith("select")
        shown = actions.reveal(self.state, panel, aside=aside)
        focused = self.main.focused_panel
        visible = arrange(self.size.width, self.size.height, shown).visible
        elsewhere = asked_from not in (None, focused)
        if focused in PANELS and focused not in visible and (self.main.in_field or elsewhere):
            shown = actions.noted(self.state, panel)
        self.state = shown

    def _first_load(self, event: JobEnded) -> bool:
        """Whether this is the model that the shell was started with: no news, but the scene."""
        return event.line in self._startup_lines and event.line.startswith("load ")

    def _announce(self, event: JobEnded) -> None:
        """Whoever turned away while a long job ran is called back."""
        # No toast: it would cover the line that is being typed, and the echo line says it too.
        self.bell()
        text = event.report.summary() if event.report else (event.error or "failed")
        if self._driver is not None:
            self._driver.write(notification(event.line, text))

    def _show(self) -> None:
        # The timer may tick once more while the screen is being taken down.
        if self.is_running and self.main.is_mounted:
            self.main.show(self.state, self._clock())

    # Intents ----------------------------------------------------------------------------------
    @on(LineEntered)
    def _line_entered(self, message: LineEntered) -> None:
        self._lines.add(message.line)
        self._typed = self._run(message.line)

    @on(Said)
    def _said(self, message: Said) -> None:
        line = chat_actions.line_for(self.state, message.text)
        self.state = replace(self.state, talk=replace(self.state.talk, revise=0))
        self._run(line)

    @on(CursorPut)
    def _cursor_put(self, message: CursorPut) -> None:
        self._change(actions.point(self.state, message.position, message.expert))

    @on(ExpertPut)
    def _expert_put(self, message: ExpertPut) -> None:
        self._change(
            actions.put(replace(self.state, anchor=None), self.state.cursor[0], message.expert)
        )

    @on(PanelPicked)
    def _panel_picked(self, message: PanelPicked) -> None:
        self._change(actions.pick_panel(self.state, message.panel))
        if message.move:
            self.main.focus_panel(message.panel)

    @on(Remarked)
    def _remarked(self, message: Remarked) -> None:
        self._say(message.level, message.text)

    @on(KeyUsed)
    def _key_used(self, message: KeyUsed) -> None:
        self._use(BY_ID[message.key])

    def choose(self, item: Item) -> None:
        """An entry of the palette: run it, or offer its command line for finishing."""
        if item.key is not None:
            self._use(BY_ID[item.key])
        elif item.reason:
            self._say("warning", f"{item.command}: {item.reason}")
        else:
            self.main.command.fill(f"{item.command} ")

    # Keys -------------------------------------------------------------------------------------
    def _use(self, key: Key) -> None:
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
        """A deed of the screen itself: a verb and its arguments, as in the keymap."""
        verb, *arguments = target.split()
        verbs: dict[str, Callable[..., object]] = {
            "move": self._move,
            "edge": lambda right: self._change(actions.edge(self.state, int(right))),
            "toggle": self._toggle,
            "shape": self._shape,
            "closer": self._closer,
            "panel": self._go,
            "open_command": self.main.command.open,
            "stay_in_command": self.main.command.enter,
            **self._handiwork(),
            "zoom": lambda: self._change(actions.zoom(self.state)),
            "next_metric": self._next_metric,
            "next_theme": self._next_theme,
            "help": self._help,
            "palette": self.action_command_palette,
            "escape": self._escape,
            "interrupt": self.interrupt,
            "leave": self._leave_or_ask,
        }
        verbs[verb](*arguments)

    def _move(self, down: str, right: str) -> None:
        self._change(actions.move(self.state, int(down), int(right)))

    def _toggle(self, option: str) -> None:
        self._change(actions.toggle(self.state, option))

    def _shape(self, wanted: str) -> None:
        self._change(actions.shape(self.state, wanted))
        # The map, the layer and the table take turns: the focus goes along.
        self.main.focus_panel("experts")

    def _closer(self) -> None:
        """From the map to a layer, from the layer to the expert under the cursor."""
        if self.state.heat.shape == "layer":
            self._use(BY_ID["dossier"])
        else:
            self._shape("layer")

    def _next_metric(self) -> None:
        from tui.heat.model import heat_model

        model = heat_model(self.state)
        if model is not None:
            self._change(actions.next_metric(self.state, model.metrics, model.metric))

    def _next_theme(self) -> None:
        self.theme = themes.after(self.theme)

    def _help(self) -> None:
        name = self.main.focused_panel
        panel = self.main.panel_named(name)
        title = panel.title if panel else "command line"
        about = self.state.names.say(panel.about if panel else self.main.command.about)
        wanted = topic(self.main.command.input.value, self.state)
        if panel is None and wanted is not None:
            about = self.engine.help(wanted, HelpScreen.columns(self.size.width))
        self.push_screen(HelpScreen(help_page(title, about, name, self.state)))

    def _escape(self) -> None:
        """Once: stop the answer, leave the field, leave the zoom. Twice: cancel the job."""
        now, job = self._clock(), self.state.job
        panel = self.main.focused_panel
        twice = now - self._escaped < DOUBLE_ESCAPE
        self._escaped = now
        talking = job is not None and job.line.split()[0] in ("chat", "ab") and panel == "chat"
        if job is not None and (twice or talking):
            self.interrupt()
            return
        if panel == "command" or self.main.in_field:
            if self.state.talk.revise:
                self._change(replace(self.state, talk=replace(self.state.talk, revise=0)))
            self.main.leave_field()
        elif self.state.token is not None:
            self._change(chat_actions.at(self.state, None))
        elif self.state.anchor is not None:
            self._change(replace(self.state, anchor=None))
        elif self.state.heat.shape == "layer" and panel == "experts":
            self._shape("layer")
        elif self.state.zoomed and job is None:
            self._change(actions.zoom(self.state))
        if job is not None:
            self._say("info", f"{self.state.names['escape']} again cancels: {job.line}")

    def interrupt(self) -> None:
        """Cancel the running job; the model stays as it was before it."""
        if self.engine.busy is None and not self.engine.queue:
            self._say("info", self.state.names.say("nothing is running; {quit} leaves"))
            return
        self.engine.cancel()
        self._say("info", "cancelling ...")

    async def action_quit(self) -> None:
        self._leave_or_ask()

    def _leave_or_ask(self) -> None:
        """Leave; what would be lost with it is said first, once."""
        now, lost = self._clock(), hints.unsaved(self.state)
        if lost and now - self._parting > PARTING:
            self._parting = now
            ways = self.state.names.say("{save} saves, {quit} again leaves")
            self._say("warning", f"{lost}: {ways}")
            return
        self.leave()

    def action_help_quit(self) -> None:
        # Ctrl+C where a user gave it no meaning: in our words, and where they are looked for.
        self._say("info", self.state.names.say("{interrupt} cancels, {quit} leaves"))

    def leave(self) -> None:
        """Leave at once, in the middle of whatever runs."""
        self.engine.cancel()
        self.exit(0)


def full_report(report: Report) -> RenderableType:
    """A report as the commands render it for a person."""
    # Imported with the first report: the first paint does not wait for it.
    from commands.output.render import render

    return render(report)


def run(
    engine: Engine,
    *,
    startup_lines: Sequence[str] = (),
    renderer: Callable[[Report], RenderableType] = full_report,
    lines_file: Path | None = None,
    config: Config = USUAL,
) -> int:
    """Show the shell until the person leaves; returns the exit code.

    startup_lines: command lines to run after the first paint. lines_file: where command lines are
    remembered between sessions; the user's state directory when None. config: the user's theme,
    keys and refresh rate; UsageError for those that there are not. On return the running job
    is told to stop and the terminal is itself again; closing the engine is the caller's part.
    """
    # Every frame of a heatmap is kilobytes: a remote terminal gets fewer.
    remote = "SSH_CONNECTION" in os.environ
    rate = REMOTE_FRAMES_PER_SECOND if remote else FRAMES_PER_SECOND
    check_config(config)
    app = ShellApp(
        engine,
        startup_lines=startup_lines,
        renderer=renderer,
        lines=LineHistory(lines_file or LineHistory.default_path()),
        config=replace(config, refresh_rate=config.refresh_rate or rate),
    )
    code = app.run()
    return app.return_code or code or 0
