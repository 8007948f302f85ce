"""Every sentence of the screen names the keys that the user has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun.evaluation.reports import ProbeReport
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tests.tui.keys.strange_keys import (
    LETTERS,
    PAGE,
    PANELS,
    ROOT,
    STAGES,
    STRANGE,
    THEIRS,
    by_hand,
    page_of,
    read,
    stages,
    state_after,
    usual_keys,
)
from tui import hints as guide
from tui import palette
from tui.input import expert_selection
from tui.keys.key_labels import USUAL, KeyNames
from tui.keys.keymap import BY_ID, KEYS
from tui.widgets.command_line import CommandLine, one_line
from tui.widgets.dialogs.help import help_page
from tui.widgets.keybar import bar_text
from tui.widgets.plan import draft_body, empty_body, plan_body


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
        "its tokens are highlighted (B)",
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
        f": {LETTERS['mix']} in the map adds an expert"
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
        "pick_more": empty_body(stages()["prune"]),
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
        "experts": f"{LETTERS['pick_below']} every expert whose share is at most",
        "chat": f"alt+{LETTERS['escape']} stops the answer",
        "plan": f"{LETTERS['preview']} measures perplexity",
        "history": f"{LETTERS['mark']} marks a state",
        "log": f"{LETTERS['zoom']} gives it the whole screen",
        "mixer": f"{LETTERS['mix_turn']} changes",
        "command": "The focus stays here until you leave",
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
        assert said.endswith(f" · its tokens are highlighted ({LETTERS['brush']})")

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
