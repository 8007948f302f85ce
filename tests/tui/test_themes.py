"""The colours of words."""

from __future__ import annotations

import pytest
from textual.color import Color

from tui import themes
from tui.heat.paint import luma


@pytest.mark.parametrize("theme", themes.THEMES, ids=lambda theme: theme.name)
def test_coloured_words_can_be_read_in_greys_too(theme) -> None:
    """What a terminal without colours shows is their lightness."""
    ansi = themes.ON_DARK if theme.dark else themes.ON_LIGHT
    ground = luma(Color.parse(theme.background).rgb)
    for number in range(1, 7):  # red, green, yellow, blue, magenta, cyan
        assert abs(luma(tuple(ansi.ansi_colors[number])) - ground) > 90, number
