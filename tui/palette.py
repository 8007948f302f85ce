"""The command palette: every command and key, with whether it applies now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

from rich.text import Text
from textual.command import DiscoveryHit, Hit, Hits, Provider

from tui import hints
from tui.keys.keymap import KEYS, command_of, command_words
from tui.state.app_state import AppState


@dataclass(frozen=True, slots=True)
class Item:
    """One entry. reason: why it cannot be chosen now, "" when it can. key: a key's id, or None
    for a command without one; command: its name."""

    title: str
    help: str
    reason: str
    key: str | None
    command: str


def items(state: AppState) -> list[Item]:
    """Every entry, commands first: those of the main job in its order, then by name."""
    out: list[Item] = []
    for key in KEYS:
        if key.id in ("palette", "escape"):
            continue
        name = command_of(key) or ""
        said, ways = command_words(key) or key.label, state.names.all(key.id)
        out.append(
            Item(
                f"{said} ({ways[0]})" if ways else said,
                state.names.say(key.help),
                hints.why_not(state, key),
                key.id,
                name,
            )
        )
    keyed = {item.command for item in out}
    for row in sorted(state.rows, key=lambda row: row.name):
        if row.name not in keyed:
            reason = "" if row.enabled else row.reason
            out.append(Item(row.usage, row.help, reason, None, row.name))
    return out


def display(item: Item) -> Text:
    """The entry as a line: greyed, with the reason, when it cannot be chosen."""
    if not item.reason:
        return Text(item.title)
    return Text.assemble((item.title, "dim"), (f"  not now: {item.reason}", "dim italic"))


def weighed(item: Item, query: str, score: float) -> float:
    """The score of a match: a command by its name stands above looser matches, and what cannot be
    chosen now below what can, where the two match alike."""
    named = item.command.startswith(query.strip().lower()) if item.command else False
    return score * (2.0 if named else 1.0) * (0.97 if item.reason else 1.0)


class Chooser(Protocol):
    """The application as the palette uses it."""

    state: AppState

    def choose(self, item: Item) -> None:
        """Carry out an entry."""


class Commands(Provider):
    """Provides the entries for the application's present state."""

    def _choices(self) -> list[tuple[Item, Callable[[], None]]]:
        app = cast(Chooser, self.app)
        return [(item, partial(app.choose, item)) for item in items(app.state)]

    async def discover(self) -> Hits:
        for item, run in self._choices():
            yield DiscoveryHit(display(item), run, text=item.title, help=item.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for item, run in self._choices():
            score = max(matcher.match(item.title), matcher.match(item.help) * 0.7)
            if score > 0:
                yield Hit(weighed(item, query, score), display(item), run,
                          text=item.title, help=item.help)  # fmt: skip
