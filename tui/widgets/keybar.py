"""The key bar: keys that apply now, the suggested next step first, others greyed."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual import events

from tui import hints
from tui.keys.keymap import Place
from tui.messages import KeyUsed
from tui.state.app_state import AppState
from tui.widgets.line import Line


class KeyBar(Line):
    """A line of keys; each can be clicked."""

    DEFAULT_CSS = """
    KeyBar { height: 1; padding: 0 1; background: $surface; }
    """

    def __init__(self) -> None:
        super().__init__(id="keys")
        self._spans: list[tuple[int, int, str]] = []

    def show(self, state: AppState, panel: Place, *, typing: bool) -> None:
        """Draw the keys for `state` while `panel` has the focus, or a text field of it."""
        shown = hints.for_bar(state, panel, self.app.size.width - 2, typing=typing)
        text, self._spans = bar_text(shown)
        self.put(text)

    def on_click(self, event: events.Click) -> None:
        for start, end, key in self._spans:
            if key and start <= event.x - 1 < end:
                self.post_message(KeyUsed(key))


def bar_text(hints: list[hints.Hint]) -> tuple[Text, list[tuple[int, int, str]]]:
    """The line, and for each key its columns [start, end) and its id."""
    text, spans = Text(no_wrap=True, overflow="ellipsis"), []
    for hint in hints:
        start = text.cell_len
        sign = Style(bold=True, color="cyan") if hint.applies else Style(dim=True)
        label = Style() if hint.applies else Style(dim=True)
        if hint.leads:
            sign, label = Style(bold=True, reverse=True), Style(bold=True)
        text.append(hint.sign, sign)
        text.append(f" {hint.label}", label)
        spans.append((start, text.cell_len, hint.key))
        text.append("  ")
    return text, spans
