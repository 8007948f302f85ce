"""The transcript, drawn by lines; only the growing answer is wrapped again."""

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import BindingType

from tui.keys.keymap import bindings
from tui.state.chat_turns import Turn
from tui.text import harmless
from tui.widgets.conversation.ab_answers import both_lines
from tui.widgets.conversation.traced import Traced
from tui.widgets.lineview import Block, Lines, LineView

INDENT = 2
TINTED = 3
"""How many of the newest answers are tinted: what lies further up is out of sight."""
_MARKED = re.compile(r"^(#{1,4} |[-*] |\d+\. |```)|\*\*\S|`\S", re.MULTILINE)


def looks_marked(text: str) -> bool:
    """Whether `text` looks like Markdown."""
    return bool(_MARKED.search(text))


def turn_lines(turn: Turn, width: int, console: Console, traced: Traced | None = None) -> Lines:
    """One turn as lines of segments, at most `width` columns wide."""
    inner = max(8, width - INDENT)
    prompt = Text(harmless(turn.prompt), style=Style(bold=True))
    lines = _indented("› ", Style(color="cyan", bold=True), wrapped(prompt, inner, console))
    if turn.both:
        lines += both_lines(turn, width, console, traced)
    elif traced is not None:
        lines += _barred(turn, wrapped(_traced(traced), inner, console))
    elif turn.text or turn.done:
        lines += _barred(turn, _answer(turn, inner, console))
    elif not turn.note and not turn.waits:
        lines += [[Segment("  ...", Style(dim=True))]]
    if turn.note or turn.waits:
        note = Text(f"[{turn.note or turn.waits}]", style=Style(italic=True, dim=True))
        lines += _indented("  ", Style(), wrapped(note, inner, console))
    return [*lines, []]


def _traced(traced: Traced) -> Text:
    """The answer as plain text with its cursor and its tinted tokens."""
    text = Text()
    for index, piece in enumerate(traced.turn.pieces):
        # A line break under the cursor must show, too.
        shown = harmless(piece.text).replace("\n", "⏎\n" if index == traced.token else "\n")
        text.append(shown, traced.style(index) or Style())
    return text


def _answer(turn: Turn, inner: int, console: Console) -> Lines:
    text = harmless(turn.text)
    if not (turn.done and looks_marked(text)):
        return wrapped(Text(text), inner, console)
    # A parser and a highlighter come with it: not before an answer needs them.
    from rich.markdown import Markdown

    options = console.options.update(width=inner)
    rendered = console.render_lines(Markdown(text, hyperlinks=False), options, pad=False)
    while rendered and not "".join(segment.text for segment in rendered[0]).strip():
        rendered.pop(0)
    return rendered


def _barred(turn: Turn, lines: Lines) -> Lines:
    """The lines of an answer with a bar in the colour of its side."""
    bar = Style(color="yellow" if turn.side == "candidate" else "blue")
    return [[Segment("▎ ", bar), *line] for line in lines]


def wrapped(text: Text, width: int, console: Console) -> Lines:
    """`text` in lines of at most `width` columns."""
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
    """The scrolling view of the conversation."""

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("chat")]

    def __init__(self) -> None:
        super().__init__()
        self._turns: tuple[Turn, ...] | None = None
        self._pointed: tuple[object, object] = (None, None)

    def show(
        self,
        turns: tuple[Turn, ...],
        token: tuple[int, int] | None = None,
        tint: tuple[int, int] | None = None,
    ) -> None:
        """Draw `turns`, oldest first. token: (job, index) under the cursor; tint: (position,
        expert) whose tokens are tinted."""
        if turns is self._turns and self._pointed == (token, tint):
            return
        self._aim(self._turns or (), turns)
        self._turns, self._pointed = turns, (token, tint)
        console = self.app.console
        blocks = []
        for place, turn in enumerate(turns):
            here = token[1] if token is not None and token[0] == turn.job else None
            tinted = tint if place >= len(turns) - TINTED else None
            traced = None
            if turn.every_piece and (here is not None or tinted is not None):
                traced = Traced(turn, here, tinted)
            blocks.append(
                Block(
                    turn.job,
                    traced or turn,
                    partial(turn_lines, turn, console=console, traced=traced),
                )
            )
        self.show_blocks(blocks)

    def _aim(self, before: tuple[Turn, ...], after: tuple[Turn, ...]) -> None:
        """Where to look: a new question brings its answer into view, and two answers that are over
        are read side by side from their heads."""
        self.to_head = False
        if not after:
            return
        earlier = next((turn for turn in before if turn.job == after[-1].job), None)
        if earlier is None:
            self._following = True
        elif after[-1].both:
            self.to_head = after[-1].done and not earlier.done
