"""A user whose keys are all strange letters, and the states of a session in which they are shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType

from mlxfun.report import TextReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell
from tui.input import expert_selection
from tui.keys.key_labels import USUAL, KeyNames
from tui.keys.keymap import KEYS
from tui.state.app_state import AppState, Draft, Entry
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.experts.experts import ExpertsPanel
from tui.widgets.experts.mixer import MixerPanel
from tui.widgets.history import HistoryPanel
from tui.widgets.log import LogPanel
from tui.widgets.plan import PlanPanel

ROOT = Path(__file__).resolve().parents[3]


PANELS = (ExpertsPanel, ChatPanel, PlanPanel, HistoryPanel, LogPanel, MixerPanel)


# A letter that nothing else on the screen uses, for every key there is. One that works in text
# fields too must not be a letter alone.
LETTERS = {key.id: chr(0x1401 + place) for place, key in enumerate(KEYS)}


STRANGE = {
    key.id: f"alt+{LETTERS[key.id]}" if key.scope == "always" else LETTERS[key.id] for key in KEYS
}


THEIRS = KeyNames.of(STRANGE)


# A key as it comes where a sentence names it: alone, in brackets or before what it does. The
# article and the pronoun are no keys, and neither are the sides of a comparison.
USUAL_KEY = re.compile(
    r"(?<![\w{'`./:>-])(?:[b-zB-HJ-Z]|F\d+|\^[a-z]|[Cc]trl\+\w|[Ee]sc(?:ape)?|[Ss]pace|Enter|enter"
    r"|[Bb]ackspace|⌫|[Ss]hift)(?![\w}'`/:+-])"
    r"|(?:^|[\s(])(?:A|[^\w\s{},●]) [a-z]+s\b|\([\d,]\)|(?:[Pp]ress|opened with) [!-z|}~](?!\w)"
)


NO_KEYS = (
    "more in A, blue more in B",
    "rank A B --n",
    "Enter runs",  # a text field's own
    "a text field ctrl+c copies",
    "enter accepts, escape cancels",  # a dialog's own
    "enter selects, escape closes",
    "enter runs, escape closes, tab completes, space changes a choice",
    "/ searches, e opens it in an editor, escape closes",
    "escape closes",
    "x output norm",
    "of weight x norm",
    "in A and B",
    "B more",
    "· its tokens",
)


def usual_keys(text: str) -> list[str]:
    """Keys as they come that `text` speaks of."""
    for words in NO_KEYS:
        text = text.replace(words, "")
    return [found[0] for found in USUAL_KEY.finditer(text)]


def read(drawn: RenderableType) -> str:
    """A renderable as text, on one line as far as words go."""
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get()


def page_of(shell: Shell) -> str:
    """The page that is shown over the screen."""
    assert isinstance(shell.app.screen, HelpScreen)
    return read(shell.app.screen._page)


def state_after(*lines: str, names: KeyNames = THEIRS) -> AppState:
    engine = FakeEngine()
    engine.play(*lines)
    return AppState(view=engine.view(), rows=engine.rows(), lines=lines, names=names)


PAGE = Entry("ok", "save {apply}", "two\nlines", TextReport("two\nlines"))


def by_hand(names: KeyNames = THEIRS) -> AppState:
    """One expert of one layer picked: the layers lose different numbers."""
    state = expert_selection.toggle(state_after("load demo", *CALIBRATED, names=names), 0.0)
    assert isinstance(state.draft, Draft)
    return state


def costly(names: KeyNames = THEIRS) -> AppState:
    state = state_after("load demo", *STAGED, "preview", names=names)
    scores = state.view.scores
    assert scores is not None
    bad = replace(scores, perplexity={"all": 2.5 * scores.baseline["all"]})
    return replace(state, view=replace(state.view, scores=bad))


def stages(names: KeyNames = THEIRS) -> dict[str, AppState]:
    """A state for each stage of the main job."""
    return {
        "": AppState(names=names),
        "collect": state_after("load demo", names=names),
        "prune": state_after("load demo", *CALIBRATED, names=names),
        "pick_even": by_hand(names),
        "preview": state_after("load demo", *STAGED, names=names),
        "apply": state_after("load demo", *STAGED, "preview", names=names),
        "discard": costly(names),
        "save": state_after("load demo", *APPLIED, names=names),
    }


STAGES = tuple(stages(USUAL))
