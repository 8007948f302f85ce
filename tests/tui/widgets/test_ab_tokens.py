"""Both answers of an A/B turn, explored token by token."""

from __future__ import annotations

from dataclasses import replace

from tests.tui.driving import STAGED, Shell, drive, ready, text_of
from tests.tui.widgets.test_ab_answers import CONSOLE, compared
from tests.tui.widgets.test_ab_answers import text_of as lines_of
from tui.widgets.conversation.ab_answers import both_lines, full_at
from tui.widgets.conversation.transcript import Transcript


def words(shell: Shell) -> str:
    return str(shell.app.main.query_one("#words").visual)


def test_the_cursor_goes_over_both_answers_and_the_map_shows_the_experts_of_each() -> None:
    @ready(*STAGED, "ab tea")
    async def test(shell: Shell) -> None:
        await shell.press("2", "escape", "right", "right", "right")
        turn = shell.app.state.turns[-1]
        assert shell.app.state.token == (turn.job, 2)
        assert "current token 3 ' toast' · KL 0.9, there ' eggs'" in words(shell)
        assert shell.app.state.lit is turn.pieces[2].experts
        await shell.press("o")
        assert shell.app.state.token == (turn.job, len(turn.pieces) + 2)
        assert "candidate token 3 ' eggs' · KL 0.9, there ' toast'" in words(shell)
        assert shell.app.state.lit is turn.other_pieces[2].experts
        one, other = turn.pieces[2].experts, turn.other_pieces[2].experts
        apart = sum(set(a) != set(b) for a, b in zip(one.tolist(), other.tolist(), strict=True))
        assert f"{apart} of 6 layers routed otherwise" in words(shell)
        # Behind the end of the shorter answer.
        await shell.press("right", "right", "right", "right")
        assert "the other answer is shorter" in words(shell)
        await shell.press("o")
        assert shell.app.state.token == (turn.job, len(turn.pieces) - 1)
        await shell.press("escape")
        assert shell.app.state.token is None
        assert "toast" in text_of(shell, Transcript)

    drive(test, size=(160, 45))


def test_the_token_under_the_cursor_is_marked_in_its_answer_and_below_the_strip() -> None:
    from tui.widgets.conversation.traced import CURSOR, Traced

    turn = compared()
    place = len(turn.pieces) + 4
    drawn = both_lines(turn, 60, CONSOLE, Traced(turn, place, None))
    under = [s.text for line in drawn for s in line if s.style == CURSOR]
    assert under == [" salted"]
    assert lines_of(drawn)[3] == "    ▲ ┃"


def test_the_bars_of_an_answer_show_what_differs_in_it() -> None:
    turn = compared()
    assert turn.comparison is not None
    small = replace(turn.comparison, kl=tuple(x / 100 for x in turn.comparison.kl))
    assert full_at(turn.comparison) == 1.6
    bars = [lines_of(both_lines(replace(turn, comparison=c), 60, CONSOLE))[2]
            for c in (turn.comparison, small)]  # fmt: skip
    assert bars[0] == bars[1]
    assert (
        "max 0.016 at token 5"
        in lines_of(both_lines(replace(turn, comparison=small), 90, CONSOLE))[4]
    )


def test_the_tokens_of_an_expert_are_tinted_in_both_answers() -> None:
    from tui.widgets.conversation.traced import TINT, Traced

    turn = compared()
    expert = int(turn.other_pieces[2].experts[0, 0])
    drawn = both_lines(turn, 60, CONSOLE, Traced(turn, None, (0, expert)))
    tinted = "".join(s.text for line in drawn for s in line if s.style == TINT)
    served = [p.text for p in turn.every_piece if (p.experts[0] == expert).any()]
    assert sorted(tinted.replace(" ", "")) == sorted("".join(served).replace(" ", ""))
