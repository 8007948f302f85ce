"""The themes: dark, light, high contrast. Heat colours belong to tui.heat.paint."""

from __future__ import annotations

from rich.terminal_theme import TerminalTheme
from textual.theme import Theme

DARK = Theme(
    name="mlxfun-dark",
    primary="#5fb3d9",
    secondary="#7f8fb5",
    accent="#ffb454",
    warning="#ffb454",
    error="#ff6b6b",
    success="#7fd88f",
    foreground="#d7dce6",
    background="#0d1017",
    surface="#12161f",
    panel="#1b212d",
    dark=True,
)
LIGHT = Theme(
    name="mlxfun-light",
    primary="#1f6f9f",
    secondary="#55617a",
    accent="#a85a00",
    warning="#a85a00",
    error="#b3202c",
    success="#1d7a3a",
    foreground="#1d2430",
    background="#f7f8fa",
    surface="#eff1f5",
    panel="#e0e4eb",
    dark=False,
)
CONTRAST = Theme(
    name="mlxfun-contrast",
    primary="#66d9ff",
    secondary="#ffffff",
    accent="#ffff00",
    warning="#ffff00",
    error="#ff8080",
    success="#80ff80",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#202020",
    dark=True,
)
THEMES = (DARK, LIGHT, CONTRAST)

# What red, green and the like are in texts. Light enough on dark, and dark enough on light, to be
# read when a terminal without colours shows them in greys.
ON_DARK = TerminalTheme(
    (13, 16, 23),
    (215, 220, 230),
    [(40, 46, 58), (255, 107, 107), (127, 216, 143), (255, 180, 84), (95, 179, 217),
     (224, 150, 240), (110, 205, 225), (215, 220, 230)],
)  # fmt: skip
ON_LIGHT = TerminalTheme(
    (247, 248, 250),
    (29, 36, 48),
    [(29, 36, 48), (168, 20, 34), (20, 104, 46), (134, 76, 0), (20, 92, 140), (130, 30, 140),
     (0, 98, 118), (110, 118, 130)],
)  # fmt: skip


def after(name: str) -> str:
    """The theme after `name`, the first after the last."""
    names = [theme.name for theme in THEMES]
    return names[(names.index(name) + 1) % len(names)] if name in names else names[0]
