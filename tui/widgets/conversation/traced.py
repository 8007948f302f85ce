"""What is marked in an answer that is drawn token by token."""

from __future__ import annotations

from dataclasses import dataclass

from rich.style import Style

from tui.state.chat_turns import Turn

# Underlined too: the token at which two answers diverge is reversed.
CURSOR = Style(reverse=True, bold=True, underline=True)
TINT = Style(bgcolor="yellow", color="black")


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """An answer drawn token by token.

    token: the place of the one under the cursor, in all pieces of the turn. tint: (position,
    expert) whose tokens are tinted.
    """

    turn: Turn
    token: int | None
    tint: tuple[int, int] | None

    def style(self, place: int) -> Style | None:
        """How the token at a place in all pieces of the turn is marked, None for not."""
        if place == self.token:
            return CURSOR
        pieces = self.turn.every_piece
        experts = pieces[place].experts if place < len(pieces) else None
        if self.tint is None or experts is None:
            return None
        position, expert = self.tint
        here = position < len(experts) and bool((experts[position] == expert).any())
        return TINT if here else None
