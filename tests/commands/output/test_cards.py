"""Tables that do not fit become cards: no digit is cut."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from rich.text import Text

from commands.output.render.base import new_table
from commands.output.render.scans import topics
from mlxfun.scans.reports import Topic, TopicsReport

FIGURES = ["+0.812", "-0.0456", "1,234,567"]


def drawn(width: int, rows: int = 2) -> list[str]:
    table = new_table(
        "expert", "composite", "gate", "tokens", "status", numbers=("composite", "gate", "tokens")
    )
    for row in range(rows):
        table.add_row(f"{row}:3", *FIGURES, Text("kept by [the] prune"))
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", range(20, 100, 7))
def test_every_figure_is_whole_at_every_width(width: int) -> None:
    lines = drawn(width)
    assert all(len(line.rstrip()) <= width for line in lines)
    words = re.findall(r"[-+\d.,:]*\d", "\n".join(lines))
    assert words == ["0:3", *FIGURES, "1:3", *FIGURES]


def test_a_card_names_what_its_figures_are() -> None:
    assert [line.rstrip() for line in drawn(40)][:3] == [
        "0:3  composite +0.812  gate -0.0456",
        "  tokens 1,234,567",
        "  status kept by [the] prune",
    ]
    assert drawn(80)[0].split() == ["expert", "composite", "gate", "tokens", "status"]


def test_very_many_cards_say_how_many_are_left_out() -> None:
    assert drawn(30, rows=250)[-1].rstrip() == "and 50 more rows"


def test_topics_keep_their_evidence_together_in_a_narrow_panel() -> None:
    words = "routed here: 89% of line breaks, 11% of other tokens (q 0.0002)"
    report = TopicsReport((Topic(0, 12, "line breaks", "profile", words, 2e-4, "s"),), 96, 96, "x")
    for width, most in ((44, 5), (110, 3)):
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(topics(report))
        shown = capture.get()
        assert len(shown.splitlines()) <= most
        assert words in " ".join(shown.split())
    assert "1 of 96 experts have a topic; 96 profiled on x" in shown
