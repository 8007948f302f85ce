"""Keys of the screen itself: moving, panels, views of the heatmap, help, stopping and leaving."""

from __future__ import annotations

from dataclasses import replace

from tui import hints, themes
from tui.input import actions, chat_actions, finding
from tui.interaction.base import KeyHandlers, Verbs
from tui.keys.keymap import BY_ID
from tui.state.app_state import Shape
from tui.state.chat_turns import loads
from tui.widgets.dialogs.find import FindScreen
from tui.widgets.dialogs.help import HelpScreen, help_page, topic
from tui.widgets.dialogs.leaving import Answer, LeaveScreen
from tui.widgets.dialogs.line_search import LineSearch

DOUBLE_ESCAPE = 1.5
"""Seconds within which a second Escape cancels the running job."""
SEARCHED = "{next_flagged} and {previous_flagged} step through the experts with WORDS; {escape} ends the search"


class NavigationKeys(KeyHandlers):
    """The part of the application that moves about on the screen."""

    _sought_expert = ""  # what the map or the layer was searched for last
    _searched = ""  # the words that n and N go on with, "" for the flagged experts
    _escaped = (0, float("-inf"))  # (job that ran, when) as Escape was pressed last

    def _navigation_verbs(self) -> Verbs:
        return {
            "move": lambda down, right: self._change(
                actions.move(self.state, int(down), int(right))
            ),
            "edge": lambda right: self._change(actions.edge(self.state, int(right))),
            "toggle": lambda option: self._change(actions.toggle(self.state, option)),
            "scale": lambda: self._change(actions.next_scale(self.state)),
            "shape": self._shape,
            "closer": self._closer,
            "panel": self._go,
            "open_command": self.main.command.open,
            "search_lines": self._search_lines,
            "stay_in_command": self.main.command.enter,
            "zoom": lambda: self._change(actions.zoom(self.state)),
            "next_metric": self._next_metric,
            "next_theme": self._next_theme,
            "help": self._help,
            "palette": self.action_command_palette,
            "escape": self._escape,
            "interrupt": self.interrupt,
            "leave": self._leave_or_ask,
            "ask_leave": lambda: self._leave_or_ask(always=True),
            "find": self._find,
            "flagged": self._flagged,
            "take_offer": self._take_offer,
            "decline": self._decline,
        }

    # The experts ------------------------------------------------------------------------------
    def _shape(self, wanted: Shape) -> None:
        self._change(actions.shape(self.state, wanted))
        # Map, layer and table replace each other: the focus moves to the one shown.
        self.main.focus_panel("experts")

    def _closer(self) -> None:
        """From the map to a layer, from the layer to the expert under the cursor."""
        if self.state.heat.shape == "layer":
            self._use(BY_ID["dossier"])
        else:
            self._shape("layer")

    def _search_lines(self) -> None:
        """Search earlier command lines; the one that is taken stands on the command line."""

        def taken(line: str | None) -> None:
            if line is not None:
                self.main.command.fill(line)

        self.push_screen(LineSearch(self.main.command.input.past), taken)

    def _find(self) -> None:
        """Ask for an expert and move the cursor to it."""
        self.push_screen(
            FindScreen("find an expert", "12:40, a topic, or steered", self._sought_expert),
            self._found,
        )

    def _found(self, text: str | None) -> None:
        if text is None:
            return
        self._sought_expert = text
        state, problem = finding.jump(self.state, text)
        if problem:
            self._say("warning", problem)
            return
        self._change(state)
        self._searched = "" if finding.is_name(text) else text
        if self._searched:
            self._say("info", self.state.names.say(SEARCHED).replace("WORDS", repr(text.strip())))

    def _flagged(self, by: str) -> None:
        if self._searched:
            state, problem = finding.search(self.state, self._searched, int(by))
        else:
            state, problem = finding.step_flagged(self.state, int(by))
        if problem:
            self._say("info", problem)
            return
        self._change(state)

    def _next_metric(self) -> None:
        from tui.heat.model import heat_model

        model = heat_model(self.state)
        if model is not None:
            self._change(actions.next_metric(self.state, model.metrics, model.metric))

    # The screen -------------------------------------------------------------------------------
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

    # Stopping and leaving ---------------------------------------------------------------------
    def _escape(self) -> None:
        """Once: stop the answer, leave the field, leave the zoom. Twice: cancel the job."""
        now, job = self._clock(), self.state.job
        panel = self.main.focused_panel
        # An Escape that only left a field while nothing ran does not count for the next job.
        running = job.id if job is not None else 0
        twice = (
            bool(running) and self._escaped[0] == running and now - self._escaped[1] < DOUBLE_ESCAPE
        )
        self._escaped = (running, now)
        answering = job is not None and job.line.split()[0] in ("chat", "ab") and panel == "chat"
        if job is not None and (twice or answering):
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
        elif self._searched and panel == "experts":
            self._searched = ""
            self._say("info", self.state.names.say("{next_flagged} steps through flagged experts"))
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

    def _leave_or_ask(self, *, always: bool = False) -> None:
        """Leave; first ask if something would be lost, or `always`."""
        lost = hints.unsaved(self.state)
        if isinstance(self.screen, LeaveScreen):
            self.screen.action_quit()
        elif lost or always:
            self.push_screen(LeaveScreen(lost, self.state.names), self._answered)
        else:
            self.leave()

    def _asks_before(self, line: str) -> bool:
        """Whether the user is asked first: another model would take the place of unsaved work."""
        lost = hints.unsaved(self.state) if loads(line) else ()
        if not lost:
            return False

        def answered(answer: Answer | None) -> None:
            if answer == "leave":
                self._run(line)
            elif answer == "save":
                self._use(BY_ID["save"])

        self.push_screen(LeaveScreen(lost, self.state.names, "load"), answered)
        return True

    def _answered(self, answer: Answer | None) -> None:
        if answer == "leave":
            self.leave()
        elif answer == "save":
            self._use(BY_ID["save"])

    def _take_offer(self) -> None:
        if self.state.offers and self.state.offers[-1].line:
            self._run(self.state.offers[-1].line)

    def _decline(self) -> None:
        self._change(replace(self.state, offers=self.state.offers[:-1]))

    def action_help_quit(self) -> None:
        # Textual calls this for Ctrl+C where the user's keys give it no meaning.
        self._say("info", self.state.names.say("{interrupt} cancels, {quit} leaves"))

    def leave(self) -> None:
        """Leave at once, cancelling whatever runs."""
        self.engine.cancel()
        self.exit(0)
