"""The mouse after a resize, in terminals that report their size in the input."""

from __future__ import annotations

import pytest
from textual import constants, events
from textual._xterm_parser import XTermParser
from textual.messages import InBandWindowResize

from tui.app import without_pixels

SUPPORTED = "\x1b[?2048;2$y"
"""What a terminal answers that can report its size in the input."""


def parsed(*sequences: str) -> list[object]:
    parser = XTermParser()
    return [token for text in sequences for token in parser.feed(text)]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEXTUAL_SMOOTH_SCROLL", raising=False)
    monkeypatch.setattr(constants, "SMOOTH_SCROLL", True)


def test_textual_would_take_the_offer_and_then_read_the_mouse_as_pixels() -> None:
    assert any(isinstance(token, InBandWindowResize) for token in parsed(SUPPORTED))
    *_, moved = parsed("\x1b[48;40;120;800;1200t", "\x1b[<35;31;11M")
    assert isinstance(moved, events.MouseMove)
    assert moved.x != 30, "cells are read as pixels: when this fails, upstream has changed"


def test_the_screen_does_not_take_it_so_that_the_mouse_stays_in_cells() -> None:
    without_pixels()
    *_, moved = parsed(SUPPORTED, "\x1b[<35;31;11M")
    assert isinstance(moved, events.MouseMove)
    assert (moved.x, moved.y) == (30, 10)
    assert not any(isinstance(token, InBandWindowResize) for token in parsed(SUPPORTED))


def test_users_who_ask_for_smooth_scrolling_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTUAL_SMOOTH_SCROLL", "1")
    without_pixels()
    assert any(isinstance(token, InBandWindowResize) for token in parsed(SUPPORTED))
