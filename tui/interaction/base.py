"""Base of the key handlers: the state, the engine, and drawing a changed state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from textual.app import App

from tui.input import actions
from tui.keys.keymap import Key, PanelName
from tui.ports import Engine
from tui.screen import MainScreen
from tui.state.app_state import PROBE_LINE, AppState, Entry, Level

Verbs = dict[str, Callable[..., object]]
"""{verb of a key's target: what it does, given the target's other words}."""


class KeyHandlers(App[int]):
    """Base of the key handlers; `ShellApp` puts them together and defines what is abstract here."""

    engine: Engine
    state: AppState
    main: MainScreen
    _clock: Callable[[], float]
    _asked: dict[int, PanelName]  # {job: the panel from which it was requested}
    _typed = 0  # the job of the newest line that was entered
    _opened = 0  # the job whose report opens a window

    def _show(self) -> None:
        """Draw `self.state`."""
        raise NotImplementedError

    def enter_line(self, line: str) -> None:
        """Run a line that the user entered, unless something has to be asked before."""
        raise NotImplementedError

    def _use(self, key: Key) -> None:
        """Do what `key` does, or say why it does nothing now."""
        raise NotImplementedError

    def _change(self, state: AppState) -> None:
        """Make `state` the current one and draw it."""
        self.state = state
        self._show()

    def _say(self, level: Level, text: str) -> None:
        """Put a message on the echo line; it does not go to the log."""
        self._change(replace(self.state, echo=Entry(level, "", text)))

    def _go(self, panel: PanelName) -> None:
        """Focus `panel`."""
        self._change(actions.pick_panel(self.state, panel))
        self.main.focus_panel(panel)

    def _run(self, line: str) -> int:
        """Queue a command line for the user; a running automatic probe is cancelled for it."""
        self.engine.cancel(only=PROBE_LINE)
        job = self.engine.run(line)
        self._asked[job] = self._workplace
        return job

    @property
    def _workplace(self) -> PanelName:
        """The focused panel, or while the command line has the focus, the panel before it."""
        focused = self.main.focused_panel
        return self.state.panel if focused == "command" else focused
