"""Nothing that a widget draws drives the terminal, wherever its text is from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hostile_text import ALONE, EVIL, shown_characters
from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.widgets import Static

from mlxfun.events import JobEnded, Progress, Token
from mlxfun.report import TextReport
from tests.tui.driving import CALIBRATED, Shell, drive, ready
from tui.screen_filter import VisibleText
from tui.text import harmless


@pytest.mark.parametrize("char", ALONE, ids=lambda c: f"U+{ord(c):04X}")
def test_every_dangerous_character_is_taken_out_of_a_line_without_changing_its_width(
    char: str,
) -> None:
    (segment,) = VisibleText().apply([Segment(f"a{char}b")], Color.parse("black"))
    assert shown_characters(segment.text) == set()
    assert cell_len(segment.text) == cell_len(f"a{char}b")
    assert harmless(f"a{char}b")[1] != char
    assert len(harmless(f"a{char}b")) == 3


def test_no_event_and_no_name_brings_one_to_the_screen() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        engine = shell.engine
        assert engine._view.model is not None
        engine._view = replace(
            engine._view, model=replace(engine._view.model, model_type=EVIL, model_id=EVIL)
        )
        seen = ""
        for event in (
            JobEnded(90, EVIL, None, EVIL, 0.0, EVIL),
            JobEnded(91, EVIL, TextReport(EVIL), None, 0.0, EVIL),
            Progress(92, EVIL, 1, 2, EVIL, 1.0),
            Token(93, "base", 0, 1, EVIL),
        ):
            engine._emit(event)
            await shell.settle()
            seen += shell.screen
        engine.notice("error", EVIL)
        engine.run(f"chat '{EVIL}'")
        await shell.settle()
        seen += shell.screen
        await shell.press("colon")
        await shell.app.main.mount(Static(EVIL, markup=False))
        await shell.settle()
        seen += shell.screen
        assert "52;c" in seen
        assert shown_characters(seen.replace("\n", "")) == set()

    drive(test)
