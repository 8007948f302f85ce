"""Both answers side by side, with the strip of KL."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from mlxfun.events import JobEnded, Token
from tests.fake_engine import FakeEngine
from tui.state import chat_turns
from tui.widgets.conversation.ab_answers import both_lines, figures, level

CONSOLE = Console(width=60, color_system="truecolor")


def text_of(lines) -> list[str]:
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


# Side by side ---------------------------------------------------------------------------------
def compared() -> chat_turns.Turn:
    engine = FakeEngine()
    seen = []
    engine.subscribe(seen.append)
    engine.play("load demo", "ab tea")
    asked = chat_turns.add_question((), 2, "ab tea")
    for event in seen:
        if isinstance(event, Token):
            asked = chat_turns.add_token(asked, event, 0.0)
        if isinstance(event, JobEnded):
            asked = chat_turns.finish(asked, event)
    return asked[0]


def test_answers_stand_side_by_side_with_the_strip_below() -> None:
    assert text_of(both_lines(compared(), 60, CONSOLE)) == [
        "▎ current                      ▎ candidate",
        "▎ Tea and toast, warm.         ▎ Tea and eggs, salted well.",
        "  ▁▁▇▃█▂",
        "    ▲",
        "  diverge at token 3 · KL per token: mean 0.447, max 1.6 at",
    ]


def test_in_a_narrow_panel_one_answer_stands_above_the_other() -> None:
    assert text_of(both_lines(compared(), 30, CONSOLE))[:4] == [
        "▎ current",
        "▎ Tea and toast, warm.",
        "▎ candidate",
        "▎ Tea and eggs, salted well.",
    ]


def test_the_token_where_they_part_is_marked_in_both() -> None:
    marked = [
        segment.text
        for line in both_lines(compared(), 60, CONSOLE)
        for segment in line
        if segment.style and segment.style.reverse
    ]
    assert marked == [" toast", " eggs"]


def test_the_strip_grows_with_the_divergence() -> None:
    heights = [level(kl) for kl in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 50.0)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 7)
    report = compared().comparison
    assert report is not None
    assert figures(replace(report, first_divergence=None)).startswith("same answer · KL per token")
