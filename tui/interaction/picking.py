"""Keys that select experts: the selection to prune, ranges, and the steering mixer."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mlxfun.events import JobEnded
from tui import hints
from tui.input import actions, expert_selection
from tui.interaction.base import KeyHandlers, Verbs
from tui.state import mixer_channels
from tui.state.app_state import PROBE_LINE

PickVerb = Literal["toggle", "dial", "even", "threshold", "row", "column", "undo"]
"""Changes of the selection, as the keymap spells them."""

MixVerb = Literal["add", "toggle", "fade", "turn", "remove"]
"""Changes of the steering mixer, as the keymap spells them."""


class ExpertKeys(KeyHandlers):
    """The part of the application that works on single experts."""

    def _expert_verbs(self) -> Verbs:
        return {
            "pick": self._pick,
            "stretch": lambda down, right: self._change(
                expert_selection.stretch(self.state, int(down), int(right))
            ),
            "mix": self._mix,
            "mark": lambda: self._change(replace(self.state, marked=self.main.selected_node)),
        }

    # Selecting experts to prune ---------------------------------------------------------------
    def _pick(self, what: PickVerb, *arguments: str) -> None:
        """Change the selection; a probe of the one before it is cancelled."""
        state, now = self.state, self._clock()
        self.engine.cancel(only=PROBE_LINE)
        match what:
            case "toggle":
                state = expert_selection.toggle(state, now)
            case "dial":
                state = expert_selection.dial(state, int(arguments[0]), now)
            case "even":
                state = expert_selection.even(state, now)
            case "threshold":
                state = expert_selection.threshold(state, now)
            case "undo":
                state = expert_selection.undo(state, now)
            case "row" | "column":
                state = expert_selection.span(state, what)
        if state.draft is not None and state.draft is not self.state.draft:
            state = actions.reveal(state, "plan", aside=True)
        self._change(state)

    def _settle(self) -> bool:
        """Stage a draft that has not changed for a while, then probe it. True if the state changed."""
        before, now = self.state, self._clock()
        line = expert_selection.due_line(before, now)
        if line:
            self.state = expert_selection.mark_sent(before)
            self._run(line)
        else:
            self.state = expert_selection.drop_unchanged(before, now)
            if expert_selection.needs_probe(self.state) and self.state.view.plan is not None:
                # Once for each plan, whatever the result.
                self.state = replace(self.state, probed=self.state.view.plan.state_after)
                self._asked[self.engine.run(PROBE_LINE)] = self._workplace
        return self.state is not before

    # The steering mixer -----------------------------------------------------------------------
    def _mix(self, what: MixVerb, *arguments: str) -> None:
        """Change a channel of the steering mixer, from the next token on."""
        state, place = self.state, self.main.mixer.selected or 0
        channels = state.mixer
        if what != "add" and place >= len(channels):
            return
        match what:
            case "add":
                layer, expert = hints.layer_at(state, state.cursor[0]), state.cursor[1]
                channels, place = mixer_channels.added(channels, layer, expert)
            case "toggle":
                channels = mixer_channels.toggled(channels, place)
            case "fade":
                channels = mixer_channels.faded(channels, place, int(arguments[0]))
            case "turn":
                channels = mixer_channels.turned(channels, place)
            case "remove":
                channels = mixer_channels.removed(channels, place)
        line = mixer_channels.changed_line(state.mixer, channels, place, state.view.steering)
        self.state = replace(state, mixer=channels, mixing=line or state.mixing)
        if what == "add":
            self._go("mixer")
            self.main.mixer.select(place)
        else:
            self._show()
        if line:
            self._run(line)

    def _remix(self, event: JobEnded) -> None:
        """Bring the mixer up to the steering in force, unless a newer change of it is queued."""
        state = self.state
        waiting = (*(line for _, line in state.queued), *(job.line for job in state.jobs))
        if state.mixing not in waiting:
            channels = mixer_channels.after_job(state.mixer, state.view.steering, event.report)
            self.state = replace(state, mixer=channels)
