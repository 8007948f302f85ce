"""The conversation, as lines: only the answer that is growing is ever wrapped again."""

from __future__ import annotations

import re

from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.state import Turn

INDENT = 2
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKED = re.compile(r"^(#{1,4} |[-*] |\d+\. |```)|\*\*\S|`\S", re.MULTILINE)


def harmless(text: str) -> str:
    """`text` without control characters, which a terminal could take for orders.

    >>> harmless("a\\x1b[31mb\\tc")
    'a�[31mb    c'
    """
    return _CONTROL.sub("�", text.replace("\r\n", "\n").replace("\t", "    "))


def looks_marked(text: str) -> bool:
    """Whether `text` seems to be Markdown rather than plain words."""
    return bool(_MARKED.search(text))


def turn_lines(turn: Turn, width: int, console: Console) -> list[list[Segment]]:
    """One turn as lines of segments, at most `width` columns wide."""
    inner = max(8, width - INDENT)
    prompt = Text(harmless(turn.prompt), style=Style(bold=True))
    lines = _indented("› ", Style(color="cyan", bold=True), _wrapped(prompt, inner, console))
    if turn.text or turn.done:
        lines += _answer(turn, inner, console)
    elif not turn.note:
        lines += [[Segment("  ...", Style(dim=True))]]
    if turn.note:
        note = Text(f"[{turn.note}]", style=Style(italic=True, dim=True))
        lines += _indented("  ", Style(), _wrapped(note, inner, console))
    return [*lines, []]


def _answer(turn: Turn, inner: int, console: Console) -> list[list[Segment]]:
    text = harmless(turn.text)
    if turn.done and looks_marked(text):
        options = console.options.update(width=inner)
        rendered = console.render_lines(Markdown(text, hyperlinks=False), options, pad=False)
        while rendered and not "".join(segment.text for segment in rendered[0]).strip():
            rendered.pop(0)
    else:
        rendered = _wrapped(Text(text), inner, console)
    candidate = turn.side == "candidate"
    bar = Style(color="yellow" if candidate else "blue")
    return [[Segment("▎ ", bar), *line] for line in rendered]


def _wrapped(text: Text, width: int, console: Console) -> list[list[Segment]]:
    lines = text.wrap(console, width, overflow="fold")
    return [
        [Segment(s.text, s.style or Style()) for s in line.render(console, end="")]
        for line in lines
    ]


def _indented(mark: str, style: Style, lines: list[list[Segment]]) -> list[list[Segment]]:
    blank = " " * len(mark)
    return [
        [Segment(blank if i else mark, style), *line] for i, line in enumerate(lines)
    ]  # fmt: skip


class Transcript(ScrollView, can_focus=True):
    """Draws turns. It follows the end unless the reader scrolled up."""

    DEFAULT_CSS = """
    Transcript { height: 1fr; scrollbar-size-vertical: 1; background: $background;
                 overflow-x: hidden; scrollbar-gutter: stable; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._turns: tuple[Turn, ...] = ()
        self._cache: dict[int, tuple[Turn, int, list[Strip]]] = {}
        self._lines: list[Strip] = []
        self._following = True

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        # Whoever scrolls up to read is left in peace; back at the end, new lines are followed.
        self._following = new_value >= self.max_scroll_y - 1

    def show(self, turns: tuple[Turn, ...]) -> None:
        """Draw `turns`, oldest first."""
        if turns is not self._turns:
            self._turns = turns
            self._rebuild()

    def _rebuild(self) -> None:
        width = self.scrollable_content_region.width
        if not width:
            return
        cache: dict[int, tuple[Turn, int, list[Strip]]] = {}
        self._lines = []
        for turn in self._turns:
            known = self._cache.get(turn.job)
            if known is None or known[0] is not turn or known[1] != width:
                strips = [Strip(line) for line in turn_lines(turn, width, self.app.console)]
                known = (turn, width, strips)
            cache[turn.job] = known
            self._lines += known[2]
        self._cache = cache
        self.virtual_size = Size(width, len(self._lines))
        self.refresh()
        if self._following:
            # The new height counts for scrolling only after the next layout.
            self.call_after_refresh(self.scroll_end, animate=False)

    def render_line(self, y: int) -> Strip:
        """One line of the window."""
        line, width, base = y + self.scroll_offset.y, self.size.width, self.rich_style
        if line >= len(self._lines):
            return Strip.blank(width, base)
        return self._lines[line].apply_style(base).adjust_cell_length(width, base)

    def on_resize(self, _: events.Resize) -> None:
        self._rebuild()
