"""What the screen says of keys is true of the user's keys, whichever they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from mlxfun.evaluation.reports import ProbeReport
from mlxfun.report import TextReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import APPLIED, CALIBRATED, STAGED, Shell, drive, ready
from tests.tui.keys.test_keymap import RUN_LINES, Willing, home
from tui import hints as guide
from tui import palette
from tui.input import expert_selection
from tui.keys.key_labels import ESSENTIAL, USUAL, KeyNames, canonical, parsed, why_not, written
from tui.keys.keymap import BY_ID, KEYS
from tui.state.app_state import AppState, Draft, Entry, Job
from tui.widgets.command_line import CommandLine, one_line
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.experts.experts import ExpertsPanel
from tui.widgets.experts.mixer import MixerPanel
from tui.widgets.help import HelpScreen, help_page
from tui.widgets.history import HistoryPanel
from tui.widgets.keybar import bar_text
from tui.widgets.log import LogPanel
from tui.widgets.plan import PlanPanel, draft_body, empty_body, plan_body

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
    "enter takes them, escape leaves them",  # a dialog's own
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


# The sources --------------------------------------------------------------------------------------
def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a module that is no docstring."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


SOURCES = sorted(
    path for path in (ROOT / "tui").rglob("*.py") if path.stem not in ("keymap", "key_labels")
)


def is_sentence(text: str) -> bool:
    """Whether a string has words: names, options and formats are none."""
    return re.search(r"[a-z]{2,}[\s)]|[\s(][a-z]{2,}", text) is not None and "    {" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_in_the_sources_names_a_key_itself(path: Path) -> None:
    named = {line: usual_keys(text) for line, text in texts(path) if is_sentence(text)}
    assert {line: keys for line, keys in named.items() if keys} == {}


@pytest.mark.parametrize(
    "text",
    [
        "Press c to calibrate.",
        ": press E to even it out",
        "  (f swaps)",
        "v measures thoroughly",
        "+ and - take one more, ] takes one",
        "escape again cancels",
        "nothing is running; ctrl+q leaves",
        "see the reports (5)",
        "A asks base and candidate the same",
        "its tokens are tinted (B)",
        "Shift with the arrows marks a range",
        "Press + for more",
        "Press F2",
        "opened with 6 it stays",
        "sorted by S, here",
    ],
)
def test_a_sentence_that_names_a_key_itself_would_be_found(text: str) -> None:
    assert is_sentence(text)
    assert usual_keys(text)


def templates() -> list[str]:
    found = [text for path in SOURCES for _, text in texts(path) if re.search(r"\{\w+\}", text)]
    return [*found, *(key.help for key in KEYS)]


@pytest.mark.parametrize("template", templates())
def test_every_sentence_says_the_users_names_of_keys_that_there_are(template: str) -> None:
    ids = re.findall(r"\{(\w+)\}", template)
    said = THEIRS.say(template)
    assert all(LETTERS[id] in said for id in ids)
    assert usual_keys(said) == []


def test_the_screen_has_many_such_sentences_and_a_wrong_id_in_one_is_an_error() -> None:
    assert sum("{" in text for text in templates()) > 30
    with pytest.raises(KeyError, match="aply"):
        USUAL.say("press {aply} to apply")


# What is drawn ------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_the_next_step_names_the_users_key(stage: str) -> None:
    state = stages()[stage]
    assert guide.next_key(state) == stage
    said = guide.next_step(state)
    assert LETTERS[stage or "command"] in said
    assert usual_keys(said) == []
    assert USUAL[stage or "command"] in guide.next_step(stages(USUAL)[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_why_a_key_does_nothing_is_said_with_the_users_keys(stage: str) -> None:
    state = stages()[stage]
    assert [usual_keys(guide.why_not(state, key)) for key in KEYS] == [[]] * len(KEYS)


def test_reasons_that_lead_on_name_the_users_key() -> None:
    state = state_after("load demo")
    assert guide.why_not(state, BY_ID["prune"]).endswith(f"press {LETTERS['collect']} to calibrate")
    assert guide.why_not(state, BY_ID["mix_up"]).endswith(
        f": {LETTERS['mix']} in the map brings an expert here"
    )
    assert f"press {LETTERS['pick_even']} to even" in guide.why_not(by_hand(), BY_ID["apply"])
    unmeasured = expert_selection.threshold(state, 0.0)
    assert unmeasured.echo is not None
    assert f"press {LETTERS['collect']} to calibrate" in unmeasured.echo.text


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("panel", ["experts", "chat", "plan", "history", "log", "mixer"])
def test_the_key_bar_writes_the_users_keys_and_fits(width: int, stage: str, panel: str) -> None:
    hints = guide.for_bar(stages()[stage], panel, width - 2)
    text, _ = bar_text(hints)
    assert text.plain.split("  ")[:-1] == [f"{THEIRS[h.key]} {h.label}" for h in hints]
    assert all(LETTERS[hint.key] in THEIRS[hint.key] for hint in hints)
    assert text.cell_len <= width


@pytest.mark.parametrize("panel", [*PANELS, CommandLine], ids=lambda panel: panel.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_the_page_of_every_panel_speaks_of_the_users_keys_only(panel: type, stage: str) -> None:
    def page(names: KeyNames) -> str:
        state, name = stages(names)[stage], getattr(panel, "panel", "command")
        return read(help_page("title", names.say(panel.about), name, state))  # type: ignore[attr-defined]

    assert usual_keys(page(USUAL))
    assert usual_keys(re.sub(r"  \w+ *$", "", page(THEIRS), flags=re.MULTILINE)) == []
    assert "{" not in page(THEIRS)


@pytest.mark.parametrize("stage", STAGES)
def test_the_palette_lists_the_users_keys(stage: str) -> None:
    for item in palette.items(stages()[stage]):
        if item.key is not None:
            assert item.title.endswith(f"({THEIRS[item.key]})")
            assert usual_keys(f"{item.help} {item.reason}") == []
            assert "{" not in f"{item.help} {item.reason}"


def test_the_plan_panel_names_the_users_keys_whatever_it_shows() -> None:
    state = stages()["preview"]
    assert state.view.plan is not None
    probe = ProbeReport(state.view.plan.state_after, "demo:eval", 512, 1.1, 1.0, 0.1, 0.9)
    bodies = {
        "collect": empty_body(stages()["collect"]),
        "dial_more": empty_body(stages()["prune"]),
        "pick_even": draft_body(by_hand()),
        "flip": plan_body(state.view, None, (), THEIRS),
        "preview": plan_body(state.view, probe, (), THEIRS),
    }
    for name, body in bodies.items():
        assert LETTERS[name] in read(body)
        assert usual_keys(re.sub(r"\d+ *\w\b", "", read(body))) == []


@pytest.mark.parametrize("size", [(80, 24), (160, 45), (60, 18)])
def test_the_whole_screen_names_the_users_keys(size: tuple[int, int]) -> None:
    ids = {f"{USUAL[key.id]} {key.label}": key.id for key in KEYS if key.bar}

    async def test(shell: Shell) -> None:
        def bar_is_theirs() -> None:
            bar = str(shell.app.main.query_one("#keys").visual)
            assert not [words for words in ids if re.search(rf"(^|  ){re.escape(words)}  ", bar)]
            assert f"{THEIRS['help']} help" in shell.screen

        await shell.play()
        assert f"Press {LETTERS['collect']} to calibrate" in shell.screen
        for lines in (CALIBRATED, STAGED[1:], ("preview",), ("apply",)):
            await shell.play(*lines)
            bar_is_theirs()
        for panel in ("experts", "chat", "plan", "history", "log", "mixer"):
            await shell.press(LETTERS["panel_experts"], LETTERS[f"panel_{panel}"])
            assert shell.app.main.focused_panel == panel
            bar_is_theirs()
            title = {"experts": "", "plan": "", "log": "reports"}.get(panel, panel)
            short = {"history": "tree", "log": "log"}.get(panel, title) if size[0] < 66 else title
            assert re.search(rf"{LETTERS[f'panel_{panel}']} (steering )?{short}", shell.screen)
            if panel == "chat":
                await shell.press(STRANGE["escape"])

    drive(test, size=size, keys=STRANGE)


@pytest.mark.parametrize("panel", [panel.panel for panel in PANELS] + ["command"])
def test_the_help_key_shows_a_page_that_speaks_of_the_users_keys(panel: str) -> None:
    words = {
        "experts": f"{LETTERS['pick_below']} takes everything that works no more",
        "chat": f"alt+{LETTERS['escape']} stops the answer",
        "plan": f"{LETTERS['preview']} measures perplexity",
        "history": f"{LETTERS['mark']} marks a state",
        "log": f"{LETTERS['zoom']} gives it the whole screen",
        "mixer": f"{LETTERS['mix_turn']} turns it",
        "command": f"opened with {LETTERS['panel_command']} it stays",
    }

    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press(LETTERS[f"panel_{panel}"], STRANGE["help"])
        said = page_of(shell)
        assert words[panel] in said.replace("\n", " ")
        assert not re.search(r"\{\w+\}", said)
        await shell.press(STRANGE["help"])
        assert shell.app.screen is shell.app.main

    drive(test, keys=STRANGE)


def test_the_line_below_the_map_names_the_key_that_tints() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press(LETTERS["panel_experts"], LETTERS["brush"])
        said = str(shell.app.main.query_one("#words").visual)
        assert said.endswith(f" · its tokens are tinted ({LETTERS['brush']})")

    drive(test, keys=STRANGE)


def test_empty_panels_name_the_users_keys() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        said = str(shell.app.main.query_one("#welcome").visual)
        assert said.startswith(f"Press {LETTERS['chat']} and ask something.")
        said = str(shell.app.main.query_one("#unsteered").visual)
        assert f"Press {LETTERS['mix']} on an expert" in said
        await shell.press(STRANGE["interrupt"])
        assert shell.echo == f"· nothing is running; alt+{LETTERS['quit']} leaves"
        assert f"see the reports ({LETTERS['panel_log']})" in one_line(PAGE, THEIRS)
        shell.engine.run("evaluate")
        shell.engine.step(1)
        await shell.settle()
        await shell.press(STRANGE["escape"])
        assert shell.echo == f"· alt+{LETTERS['escape']} again cancels: evaluate"

    drive(test, keys=STRANGE)


# Keys of the user, at work ------------------------------------------------------------------------
def test_renamed_keys_are_named_and_work_and_the_old_ones_do_nothing() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert "Press ^g to calibrate" in shell.screen
        assert "^g calibrate" in shell.screen
        before = list(shell.engine.lines)
        await shell.press("c")
        assert not shell.app.main.in_field
        await shell.press("ctrl+g")
        assert shell.app.main.command.input.value == "collect --dataset demo:mixed"
        await shell.press("enter")
        await shell.play(*STAGED[1:], "preview")
        assert "Press F9 to apply" in guide.next_step(shell.app.state)
        assert "F9 apply" in shell.screen
        await shell.press("a")
        assert "apply" not in shell.engine.lines
        await shell.press("f9")
        assert shell.engine.lines[len(before) :][-1] == "apply"

    drive(test, keys={"apply": "f9,ctrl+a", "collect": "ctrl+g"})


def test_every_renamed_key_of_a_command_works_and_none_of_the_old_ones() -> None:
    @ready(*STAGED, "apply", "undo", "chat hello")
    async def test(shell: Shell) -> None:
        for key in (key for key in KEYS if key.kind == "run"):
            await home(shell, key)
            before = len(shell.engine.lines)
            await shell.press(*key.keys.split(","))
            assert shell.engine.lines[before:] == [], key.id
            await shell.press(STRANGE[key.id])
            assert shell.engine.lines[before:] == [RUN_LINES[key.id]], key.id

    drive(test, engine=Willing(), keys=STRANGE)


def test_brackets_as_keys_are_no_markup() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert str(shell.app.main.query_one("#welcome").visual).startswith("Press [ and ask")
        assert "Press ] on an expert" in str(shell.app.main.query_one("#unsteered").visual)
        await shell.press("f1")
        assert "[  talk to the live model" in page_of(shell)
        assert "]  bring this expert to" in page_of(shell)

    drive(test, keys={"chat": "[", "mix": "]", "pick_more": "f8", "pick_fewer": "f9"})


def test_textuals_own_keys_move_along() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("ctrl+q")
        assert shell.engine.lines[-1] == "apply"
        main = shell.app.screen
        await shell.press("ctrl+p")
        assert shell.app.screen is main
        await shell.press("f8")
        assert shell.app.screen is not main
        await shell.press("escape", "f9")
        assert shell.app.screen is not main  # F9 opens the help ...
        await shell.press("f9")
        assert shell.app.screen is main  # ... and closes it
        await shell.press("ctrl+c")
        assert shell.echo == "· F11 cancels, F10 leaves"
        await shell.press("f10")
        assert "F10 again leaves" in shell.echo
        await shell.press("f10")

    keys = {"apply": "ctrl+q", "quit": "f10", "palette": "f8", "help": "f9", "interrupt": "f11"}
    shell = drive(test, keys=keys, engine=Willing())
    assert shell.app.return_code == 0


# No key at all ------------------------------------------------------------------------------------
BARE = {"apply": "", "pick": "", "panel_plan": "", "plan_save": "", "new_chat": "", "goto": ""}


def test_a_key_that_was_taken_away_does_nothing_and_its_command_is_named() -> None:
    @ready(*STAGED, "preview")
    async def test(shell: Shell) -> None:
        said = guide.next_step(shell.app.state)
        assert said.startswith("Measured. Press :apply to apply, d to discard")
        bar = str(shell.app.main.query_one("#keys").visual)
        assert " apply" not in bar
        assert "  d discard  " in bar
        await shell.press("a", "3")
        assert "apply" not in shell.engine.lines
        plan = shell.app.main.panel_named("plan")
        assert plan is not None
        assert str(plan.border_title) == "staged plan"
        await shell.press("f1")
        assert ":apply  commit the staged plan" in page_of(shell)

    drive(test, keys=BARE)


def test_what_has_no_key_is_called_by_what_leads_to_it() -> None:
    names = KeyNames.of(BARE)
    called = {id: names[id] for id in BARE}
    assert called == {
        "apply": ":apply",
        "pick": "^p pick",
        "panel_plan": "^p plan",
        "plan_save": ":plan save",
        "new_chat": ":chat --new",
        "goto": ":goto",
    }
    assert KeyNames.of({**BARE, "command": "f4", "palette": "f5"})["apply"] == "F4 apply"
    item = next(i for i in palette.items(AppState(names=names)) if i.key == "apply")
    assert item.title == "apply"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.id)
def test_every_key_can_be_taken_away_but_those_that_lead_to_the_others(key: object) -> None:
    assert isinstance(key, type(KEYS[0]))
    assert bool(why_not(key.id, "")) == (key.id in ESSENTIAL)
    if key.id not in ESSENTIAL:
        names = KeyNames.of({key.id: ""})
        assert names[key.id].startswith((":", "^p "))
        assert len(names[key.id]) > len("^p ")


# Names of keys ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "name", "shown"),
    [
        ("a", "a", "a"),
        ("A", "A", "A"),
        ("+", "plus", "+"),
        ("plus", "plus", "+"),
        ("]", "right_square_bracket", "]"),
        (",", "comma", ","),
        ("é", "é", "é"),
        ("ctrl+r", "ctrl+r", "^r"),
        ("Ctrl+R", "ctrl+r", "^r"),
        ("ctrl+]", "ctrl+right_square_bracket", "^]"),
        ("ctrl+left", "ctrl+left", "ctrl+←"),
        ("shift+ctrl+left", "ctrl+shift+left", "ctrl+shift+←"),
        ("alt+X", "alt+shift+x", "alt+shift+x"),
        ("f12", "f12", "F12"),
        ("pageup", "pageup", "page up"),
        ("esc", "escape", "esc"),
        ("ctrl+m", "enter", "enter"),
        ("ctrl+space", "ctrl+@", "^space"),
    ],
)
def test_a_key_is_bound_as_a_terminal_sends_it_and_written_as_a_person_does(
    given: str, name: str, shown: str
) -> None:
    assert parsed(given) == (name,)
    assert written(name) == shown


@pytest.mark.parametrize("given", ["ctl+a", "foo", "f99", "ctrl+", "shift+a", "ab", "\t"])
def test_what_is_no_key_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(given))):
        canonical(given)


def test_the_keys_as_they_come_need_no_other_binding() -> None:
    assert USUAL.bindings() == {}
    assert KeyNames.of({"apply": " a "}).bindings() == {}
    assert KeyNames.of({"apply": "f9, +", "undo": ""}).bindings() == {
        "apply": "f9,plus",
        "undo": "no_key_for_undo",
    }


# Words from outside -------------------------------------------------------------------------------
def test_words_from_outside_keep_their_braces() -> None:
    assert one_line(PAGE, USUAL) == "save {apply}: see the reports (5)"
    loading = AppState(jobs=(Job(1, "load {apply}", 0.0),))
    assert guide.next_step(loading) == "load {apply}: starting ..."

    @ready("chat 'What is {apply}?'", "name 0 {collect}")
    async def test(shell: Shell) -> None:
        assert "What is {apply}?" in shell.screen
        assert "{collect}" in shell.screen

    drive(test)
