"""The conversation, as lines: only the answer that is growing is ever wrapped again."""

from __future__ import annotations

import re
from functools import partial

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from tui.state import Turn
from tui.text import harmless
from tui.widgets.lineview import Block, Lines, LineView

INDENT = 2
_MARKED = re.compile(r"^(#{1,4} |[-*] |\d+\. |```)|\*\*\S|`\S", re.MULTILINE)


def looks_marked(text: str) -> bool:
    """Whether `text` seems to be Markdown rather than plain words."""
    return bool(_MARKED.search(text))


def turn_lines(turn: Turn, width: int, console: Console) -> Lines:
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


def _answer(turn: Turn, inner: int, console: Console) -> Lines:
    text = harmless(turn.text)
    if turn.done and looks_marked(text):
        # A parser and a highlighter come with it: not before an answer needs them.
        from rich.markdown import Markdown

        options = console.options.update(width=inner)
        rendered = console.render_lines(Markdown(text, hyperlinks=False), options, pad=False)
        while rendered and not "".join(segment.text for segment in rendered[0]).strip():
            rendered.pop(0)
    else:
        rendered = _wrapped(Text(text), inner, console)
    candidate = turn.side == "candidate"
    bar = Style(color="yellow" if candidate else "blue")
    return [[Segment("▎ ", bar), *line] for line in rendered]


def _wrapped(text: Text, width: int, console: Console) -> Lines:
    lines = text.wrap(console, width, overflow="fold")
    return [
        [Segment(s.text, s.style or Style()) for s in line.render(console, end="")]
        for line in lines
    ]


def _indented(mark: str, style: Style, lines: Lines) -> Lines:
    blank = " " * len(mark)
    return [
        [Segment(blank if i else mark, style), *line] for i, line in enumerate(lines)
    ]  # fmt: skip


class Transcript(LineView):
    """Draws turns."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: tuple[Turn, ...] = ()

    def show(self, turns: tuple[Turn, ...]) -> None:
        """Draw `turns`, oldest first."""
        if turns is self._turns:
            return
        self._turns = turns
        console = self.app.console
        self.show_blocks(
            [Block(turn.job, turn, partial(turn_lines, turn, console=console)) for turn in turns]
        )
