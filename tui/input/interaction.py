"""The part of the application that carries out keys for selection, mixer and conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from textual.app import App

from mlxfun.events import JobEnded
from tui import clipboard, hints
from tui.input import actions, chat_actions, expert_selection, steering_mixer
from tui.ports import Engine
from tui.screen import MainScreen
from tui.state import QUIET_LINE, AppState, Entry, Talk
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.chat_settings import ChatSettings


class Hands(App[int]):
    """The part of the application that turns such keys into states and command lines."""

    engine: Engine
    state: AppState
    main: MainScreen
    _clock: Callable[[], float]
    _asked: dict[int, str]  # job -> the panel from which it was asked for

    def _show(self) -> None:
        raise NotImplementedError

    def _change(self, state: AppState) -> None:
        self.state = state
        self._show()

    def _say(self, level: str, text: str) -> None:
        """A word on the echo line, not worth keeping."""
        self._change(replace(self.state, echo=Entry(level, "", text)))

    def _go(self, panel: str) -> None:
        self._change(actions.pick_panel(self.state, panel))
        self.main.focus_panel(panel)

    def _handiwork(self) -> dict[str, Callable[..., object]]:
        """The verbs of the keymap that are done here."""
        return {
            "pick": self._pick,
            "stretch": lambda down, right: self._change(
                expert_selection.stretch(self.state, int(down), int(right))
            ),
            "mix": self._mix,
            "mark": lambda: self._change(replace(self.state, marked=self.main.selected_node)),
            "both": self._both,
            "converse": self._converse,
            "talk": self._talk,
            "token": lambda by: self._change(chat_actions.step(self.state, int(by))),
            "again": self._again,
            "revise": self._revise,
            "copy": self._copy,
            "brush": lambda: self._change(replace(self.state, brush=not self.state.brush)),
        }

    def _settle(self) -> bool:
        """What was picked by hand becomes a command line when the hand rests, and is then probed."""
        before, now = self.state, self._clock()
        line = expert_selection.resting(before, now)
        if line:
            self.state = expert_selection.sent(before)
            self._run(line)
        else:
            self.state = expert_selection.settle(before, now)
            if expert_selection.wants_probe(self.state) and self.state.view.plan is not None:
                # Asked once for each plan, whatever comes of it.
                self.state = replace(self.state, probed=self.state.view.plan.state_after)
                self._asked[self.engine.run(QUIET_LINE)] = self._workplace
        return self.state is not before

    def _run(self, line: str) -> int:
        """Queue a command line that a person asked for: a probe in its way is dropped."""
        self.engine.cancel(only=QUIET_LINE)
        job = self.engine.run(line)
        self._asked[job] = self._workplace
        return job

    @property
    def _workplace(self) -> str:
        """The panel in which a person is at work; whoever types a command comes from one."""
        focused = self.main.focused_panel
        return self.state.panel if focused == "command" else focused

    def _pick(self, what: str, *arguments: str) -> None:
        """Change what goes, by hand; a probe of what went before is of no use any more."""
        state, now = self.state, self._clock()
        self.engine.cancel(only=QUIET_LINE)
        match what:
            case "toggle":
                state = expert_selection.toggle(state, now)
            case "dial":
                state = expert_selection.dial(state, int(arguments[0]), now)
            case "even":
                state = expert_selection.even(state, now)
            case "threshold":
                state = expert_selection.threshold(state, now)
            case _:
                state = expert_selection.span(state, what)
        if state.draft is not None and state.draft is not self.state.draft:
            state = actions.reveal(state, "plan", aside=True)
        self._change(state)

    def _mix(self, what: str, *arguments: str) -> None:
        """Change a channel of the steering mixer; the next token follows it."""
        state, place = self.state, self.main.mixer.selected or 0
        channels = state.mixer
        if what != "add" and place >= len(channels):
            return
        match what:
            case "add":
                layer, expert = hints.layer_at(state, state.cursor[0]), state.cursor[1]
                channels, place = steering_mixer.added(channels, layer, expert)
            case "toggle":
                channels = steering_mixer.toggled(channels, place)
            case "fade":
                channels = steering_mixer.faded(channels, place, int(arguments[0]))
            case "turn":
                channels = steering_mixer.turned(channels, place)
            case _:
                channels = steering_mixer.removed(channels, place)
        line = steering_mixer.line(channels, state.view.steering)
        self.state = replace(state, mixer=channels, mixing=line)
        if what == "add":
            self._go("mixer")
            self.main.mixer.select(place)
        else:
            self._show()
        if steering_mixer.line(state.mixer, state.view.steering) != line:
            self._run(line)

    def _remix(self, event: JobEnded) -> None:
        """After a job the mixer shows the steering in force, unless a newer change is on its way."""
        state = self.state
        waiting = (*(line for _, line in state.queued), *(job.line for job in state.jobs))
        if state.mixing not in waiting:
            self.state = replace(state, mixer=steering_mixer.after_job(state, event.report))

    def _both(self) -> None:
        """The chat field asks both sides, or one again."""
        wish = replace(self.state.talk, both=not self.state.talk.both, revise=0)
        self._change(replace(self.state, talk=wish))
        self._go("chat")

    def _converse(self) -> None:
        """Talk to the live model alone."""
        self._change(replace(self.state, talk=replace(self.state.talk, both=False)))
        self._go("chat")

    def _talk(self) -> None:
        self.push_screen(ChatSettings(self.state.talk), self._talk_set)

    def _talk_set(self, wish: Talk | None) -> None:
        if wish is not None:
            self._change(replace(self.state, talk=wish))

    def _again(self) -> None:
        line = chat_actions.again_line(self.state)
        if line:
            same = not self.state.talk.temperature
            self._change(chat_actions.after_again(self.state))
            self._run(line)
            if same:
                words = (
                    "asked again; at temperature 0 the answer stays the same: {talk} sets another"
                )
                self._say("info", self.state.names.say(words))
        else:
            self._say("warning", "ask again: the conversation does not hold this question")

    def _revise(self) -> None:
        turn = chat_actions.chosen(self.state)
        back = chat_actions.back_to(self.state, turn)
        if turn is None or not back:
            self._say("warning", "edit: the conversation does not hold this question")
            return
        wish = replace(self.state.talk, revise=back, both=False)
        self._change(replace(self.state, talk=wish))
        self.main.query_one(ChatPanel).fill(turn.prompt)
        self._go("chat")

    def _copy(self) -> None:
        turn = chat_actions.chosen(self.state)
        if turn is None or not turn.text:
            self._say("warning", "copy: there is no answer yet")
            return
        text = f"{turn.text}\n\n{turn.other}" if turn.both else turn.text
        self._say("info", clipboard.copy(text, self.copy_to_clipboard))
