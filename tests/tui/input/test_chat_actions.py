"""Steering the chat: ask again, edit, both sides, tokens and their experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from mlxfun.events import JobEnded, Token
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui import clipboard
from tui.input import chat_actions
from tui.state import chat_turns
from tui.state.app_state import AppState, ChatOptions
from tui.widgets.conversation.chat_settings import ChatSettings, read, shown
from tui.widgets.conversation.transcript import Traced, Transcript, turn_lines
from tui.widgets.tabs import TabStrip

CONSOLE = Console(width=60, color_system="truecolor")


# Lines ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wish", "line"),
    [
        (ChatOptions(), "chat hello"),
        (ChatOptions(temperature=0.5, max_tokens=9), "chat --temperature 0.5 --max-tokens 9 hello"),
        (
            ChatOptions(system="be brief", thinking=False),
            "chat --system 'be brief' --no-thinking hello",
        ),
        (ChatOptions(both=True, seed=3), "ab --seed 3 hello"),
        (ChatOptions(revise=2), "chat --back 2 hello"),
    ],
)
def test_settings_become_options_of_the_line(wish: ChatOptions, line: str) -> None:
    assert chat_actions.line_for(AppState(talk=wish), "hello") == line


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("chat hi there", ("chat", "hi there", 0, False)),
        ("ab --seed 3 -- -hi", ("ab", "-hi", 0, False)),
        ("chat --back 2", ("chat", None, 2, False)),
        ("chat --back=2 --no-thinking again", ("chat", "again", 2, False)),
        ("chat --new", ("chat", None, 0, True)),
    ],
)
def test_what_a_line_asks_is_read_from_it(line: str, asked: tuple) -> None:
    assert chat_turns.asked_of(line) == asked
    assert chat_turns.asked_of("collect") is None


def test_settings_that_are_no_values_are_refused_in_words() -> None:
    for values, sentence in (
        ({"temperature": "hot"}, "temperature is a number, not 'hot'"),
        ({"temperature": "-1"}, "temperature is at least 0, not -1"),
        ({"max_tokens": "0"}, "longest answer is at least 1, not 0"),
        ({"seed": "1.5"}, "seed is a whole number, not '1.5'"),
        ({"thinking": "maybe"}, "thinking is on, off or empty, not 'maybe'"),
    ):
        with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
            read(values, ChatOptions())


def test_settings_read_back_as_they_were_shown() -> None:
    wish = ChatOptions(system="be brief", temperature=0.5, max_tokens=9, seed=1, thinking=True)
    assert read(shown(wish), ChatOptions()) == wish
    assert read({}, ChatOptions()) == ChatOptions()
    # The conversation would keep the old prompt unless it is told otherwise.
    assert read({}, ChatOptions(system="be brief")).system == ""


# On the screen --------------------------------------------------------------------------------
def test_a_question_is_asked_again_and_its_answer_replaced() -> None:
    @ready("chat one", "chat two")
    async def test(shell: Shell) -> None:
        await shell.press("i", "escape", "g")
        assert shell.engine.lines[-1] == "chat --back 1"
        assert [turn.prompt for turn in shell.app.state.turns] == ["one", "two"]
        shell.engine.finish()
        await shell.settle()
        assert [(t.prompt, t.done, t.kept) for t in shell.app.state.turns] == [
            ("one", True, True),
            ("two", True, True),
        ]

    drive(test)


def test_with_a_temperature_asking_again_draws_with_another_seed() -> None:
    @ready("chat one")
    async def test(shell: Shell) -> None:
        shell.app.state = replace(shell.app.state, talk=ChatOptions(temperature=0.8))
        await shell.press("i", "escape", "g")
        shell.engine.finish()
        await shell.press("g")
        assert shell.engine.lines[-2:] == [
            "chat --temperature 0.8 --seed 1 --back 1",
            "chat --temperature 0.8 --seed 2 --back 1",
        ]

    drive(test)


def test_an_earlier_question_is_edited_and_what_followed_it_goes() -> None:
    @ready("chat one", "chat two", "chat three")
    async def test(shell: Shell) -> None:
        await shell.press("i", "escape")
        first = shell.app.state.turns[1].job
        shell.app.state = chat_actions.at(shell.app.state, (first, 0))
        await shell.press("enter")
        assert getattr(shell.app.focused, "value", "") == "two"
        await shell.press("exclamation_mark", "enter")
        assert shell.engine.lines[-1] == "chat --back 2 'two!'"
        shell.engine.finish()
        await shell.settle()
        assert [turn.prompt for turn in shell.app.state.turns] == ["one", "two!"]
        await shell.press("x", "enter")
        assert shell.engine.lines[-1] == "chat x"

    drive(test)


def test_leaving_the_field_leaves_the_question_as_it_was() -> None:
    @ready("chat one")
    async def test(shell: Shell) -> None:
        await shell.press("i", "escape", "enter", "escape")
        assert shell.app.state.talk.revise == 0

    drive(test)


def test_a_failed_repetition_brings_the_old_answers_back() -> None:
    asked: chat_turns.Turns = chat_turns.add_question((), 1, "chat one")
    asked = chat_turns.finish(asked, JobEnded(1, "chat one", FakeReport, None, 0.1, ""))
    asked = tuple(replace(t, kept=True) for t in asked)
    again = chat_turns.add_question(asked, 2, "chat --back 1")
    assert [t.job for t in again] == [2]
    failed = chat_turns.finish(again, JobEnded(2, "chat --back 1", None, "no", 0.1, ""))
    assert [(t.job, t.kept) for t in failed] == [(1, True), (2, False)]


FakeReport = None


def test_the_settings_are_typed_into_a_dialog() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.press("comma")
        await shell.press(*"short", "tab", *"hot", "enter")
        assert isinstance(shell.app.screen, ChatSettings)
        said = str(shell.app.screen.query_one("#wrong").visual)
        assert said == "✗ temperature is a number, not 'hot'"
        await shell.press("backspace", "backspace", "backspace", *"0.7", "enter")
        assert shell.app.state.talk == ChatOptions(system="short", temperature=0.7)
        assert shell.app.main.panel_named("chat").border_subtitle == (
            "system prompt · temperature 0.7"
        )
        await shell.press("comma", *"er", "escape")
        assert shell.app.state.talk.system == "short"

    drive(test)


def test_both_sides_are_asked_from_the_field_until_it_is_switched_back() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("A", *"tea?", "enter")
        assert shell.engine.lines[-1] == "ab 'tea?'"
        shell.engine.step(8)
        await shell.settle()
        turn = shell.app.state.turns[-1]
        assert (turn.text, turn.other) == ("Tea and toast,", "Tea and eggs")
        assert turn.tokens == 7, "both are answered at this speed"
        shell.engine.finish()
        await shell.settle()
        assert shell.app.state.turns[-1].comparison is not None
        await shell.press("escape", "A", *"x", "enter")
        assert shell.engine.lines[-1] == "chat x"

    drive(test)


@pytest.mark.parametrize(
    ("lines", "lighting"),
    [
        (STAGED, "candidate"),
        ((*STAGED, "flip"), "base"),
        # Without a plan the live model stands second, against the checkpoint.
        (CALIBRATED, "candidate"),
    ],
)
def test_while_both_answer_the_map_shows_the_live_side(lines: tuple, lighting: str) -> None:
    @ready(*lines)
    async def test(shell: Shell) -> None:
        shell.engine.run("ab tea")
        heard = []
        shell.engine.subscribe(lambda e: heard.append(e) if isinstance(e, Token) else None)
        for tokens in range(1, 14):
            while len(heard) < tokens:
                shell.engine.step()
            await shell.settle()
            mine = [event for event in heard if event.side == lighting]
            lit, traffic = shell.app.state.lit, shell.app.state.traffic
            assert lit is (mine[-1].experts if mine else None)
            assert traffic is None or traffic[0].sum() == 2 * len(mine)
        assert {event.side for event in heard} == {"base", "candidate"}

    drive(test)


# Tokens and experts ---------------------------------------------------------------------------
def test_moving_over_a_token_lights_its_experts() -> None:
    @ready(*CALIBRATED, "chat hello")
    async def test(shell: Shell) -> None:
        await shell.press("i", "escape", "right", "right")
        state = shell.app.state
        assert state.token is not None
        assert state.token[1] == 1
        assert state.lit.tolist() == [[(1 + ly) % 16, (6 + ly) % 16] for ly in range(6)]
        words = str(shell.app.main.query_one("#words").visual)
        assert words.startswith("token 2 ' expert' routed to L0:1,6  L1:2,7")
        await shell.press("escape")
        assert (shell.app.state.token, shell.app.state.lit) == (None, None)

    drive(test)


def test_a_new_token_takes_the_light() -> None:
    @ready("chat hello")
    async def test(shell: Shell) -> None:
        await shell.press("i", "escape", "right")
        shell.engine.run("chat more")
        shell.engine.step(2)
        await shell.settle()
        assert shell.app.state.token is None
        assert shell.app.state.lit is not None

    drive(test)


def test_the_tokens_of_an_expert_are_tinted() -> None:
    @ready("chat hello")
    async def test(shell: Shell) -> None:
        turn = shell.app.state.turns[-1]
        # Expert 5 of layer 0 serves token 0 (0 + 5) and token 5.
        assert chat_turns.served(turn, 0, 5) == (2, 7)
        lines = turn_lines(turn, 60, CONSOLE, Traced(turn, None, (0, 5)))
        tinted = [s.text for line in lines for s in line if s.style and s.style.bgcolor]
        assert tinted == ["An", " network"]
        shell.app.main.focus_panel("experts")
        await shell.press("B", *["right"] * 5)
        words = str(shell.app.main.query_one("#words").visual)
        assert words.endswith("2 of the answer's 7 tokens routed to it")

    drive(test)


def test_old_answers_lose_their_experts_not_their_words() -> None:
    asked: chat_turns.Turns = ()
    for job in range(chat_turns.TRACED + 2):
        asked = chat_turns.add_question(asked, job, f"chat {job}")
        asked = chat_turns.add_token(asked, Token(job, "base", 0, 1, "yes"), 0.0)
    assert [bool(turn.pieces) for turn in asked[:3]] == [False, False, True]
    assert all(turn.text == "yes" for turn in asked)


# Copying --------------------------------------------------------------------------------------
def test_copying_over_the_terminal_claims_no_success() -> None:
    sent = []
    said = clipboard.copy("abc", sent.append, platform="linux")
    assert sent == ["abc"]
    assert said.startswith("sent 3 characters to the terminal's clipboard (OSC 52")


def test_on_a_mac_without_pbcopy_the_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    sent = []
    assert clipboard.copy("a\nb", sent.append, platform="darwin").startswith("sent 2 lines")
    assert sent == ["a\nb"]


def test_two_long_answers_are_read_from_their_heads_and_the_next_question_is_followed() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        transcript = shell.app.main.query_one(Transcript)

        def at_the_end() -> bool:
            return transcript.scroll_offset.y == transcript.max_scroll_y > 0

        await shell.press("2", "1")
        shell.engine.run("ab 'tell me at length'")
        shell.engine.step(200)
        await shell.until(at_the_end)
        shell.engine.finish()
        await shell.until(lambda: "tell me at length" in transcript.render_line(0).text)
        transcript.scroll_to(y=3, animate=False)
        await shell.press("B")
        await shell.settle()
        assert transcript.scroll_offset.y == 3, "who reads on is left in peace"
        await shell.play("chat 'and now?'")
        await shell.until(at_the_end)

    drive(test, size=(80, 24))


def test_what_is_typed_into_the_chat_stays_there_whatever_ends_meanwhile() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("1", "v", "i", "w", "h")
        shell.engine.finish()
        await shell.settle()
        await shell.press("a", "d")
        assert shell.app.focused.value == "whad"
        assert shell.engine.lines[-1] == "preview", "nothing was applied or discarded"
        assert "plan" in shell.app.state.unseen
        assert "3 plan•" in str(shell.app.main.query_one(TabStrip).visual)
        await shell.play("discard")
        assert "3 plan•" not in str(shell.app.main.query_one(TabStrip).visual), "it is gone"
        await shell.press("escape", "3")
        assert shell.app.state.unseen == frozenset()

    drive(test, size=(80, 24))


def test_the_end_of_an_answer_leaves_the_hands_on_the_mixer() -> None:
    @ready(*CALIBRATED, "steer --level 1:2=1")
    async def test(shell: Shell) -> None:
        await shell.press("i", "h", "o", "enter")
        shell.engine.step(3)
        await shell.settle()
        await shell.press("f7")
        assert shell.app.main.focused_panel == "mixer"
        shell.engine.finish()
        await shell.settle()
        assert shell.app.main.focused_panel == "mixer"
        await shell.press("minus")
        assert shell.engine.lines[-1] == "steer --clear --level 1:2=0.5"

    drive(test, size=(80, 24))


def test_whoever_waits_where_the_command_was_given_is_shown_its_outcome() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("7", "e")
        shell.engine.finish()
        await shell.settle()
        assert shell.app.main.focused_panel == "log"

    drive(test, size=(80, 24))


def test_a_question_to_both_sides_ends_with_what_there_was_to_compare() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("A", "escape", "d")
        shell.engine.finish()
        await shell.settle()
        assert not shell.app.state.talk.both
        await shell.press("A")
        assert "nothing to compare" in shell.echo
        await shell.play("prune --n-prune 4")
        await shell.press("1", "A", "escape", "1", "i")
        assert not shell.app.state.talk.both, "i talks to one again"

    drive(test)


def test_a_new_conversation_begins_with_an_empty_page() -> None:
    @ready(*CALIBRATED, "chat hello", "chat again")
    async def test(shell: Shell) -> None:
        await shell.play("chat --new")
        assert shell.app.state.turns == ()
        assert shell.app.state.beside == "chat"
        await shell.play("chat --new hello")
        assert [turn.prompt for turn in shell.app.state.turns] == ["hello"]

    drive(test, size=(80, 24))


def test_the_settings_show_the_values_in_force_where_nothing_is_set() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("comma")
        for words in ("0 (0 is greedy)", "256 tokens", "7"):
            assert words in shell.screen, words

    drive(test)
