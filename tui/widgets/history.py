"""The history panel: the tree of committed states with their scores."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widget import Widget
from textual.widgets.option_list import Option

from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.text import readable_bytes
from tui import hints
from tui.keys.keymap import BY_ID, bindings
from tui.state.app_state import AppState
from tui.state.steering import step_name
from tui.text import harmless, shortened, tree
from tui.widgets.line import Line
from tui.widgets.lists import PanelList
from tui.widgets.panel import Panel

METER = 16
SHORT = {"perplexity": "ppl", "kl_mean": "KL", "top1_agreement": "top-1"}


def node_line(lead: str, node: HistoryNode, current: bool, marked: bool = False) -> Text:
    """One state: its place in the tree, name or command, and scores."""
    text = Text(lead, style="dim", no_wrap=True, overflow="ellipsis")
    text.append("● " if current else "○ ", "bold" if current else "")
    if marked:
        text.append("◆ ", "bold not dim")
    text.append(f"{node.id} ", "bold" if current else "dim not bold")
    if node.label:
        text.append(f"{harmless(node.label)}  ", "bold not dim italic")
    text.append(step_name(node.command), "bold not dim" if current else "not dim")
    text.append(f"  {node.state[:8]}", "dim")
    if node.bytes:
        text.append(f"  {readable_bytes(node.bytes)}", "dim")
    for name, value in node.scores.items():
        text.append(f"  {SHORT.get(name, name)} {value:.4g}", "dim")
    return text


def meter(history: HistoryReport, width: int) -> Text:
    """A bar: how much of the undo budget is used."""
    held = f"undo holds {readable_bytes(history.bytes_held)}"
    if history.budget is None:
        return Text(f"{held}, no limit", style="dim")
    share = history.bytes_held / history.budget if history.budget else 1.0
    said = f" {held} of {readable_bytes(history.budget)} ({share:.0%})"
    room = max(4, min(METER, width - len(said) - 1))
    style = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    full = round(min(share, 1.0) * room)
    return Text.assemble(("━" * full, style), ("─" * (room - full), "dim"), (said, "dim"))


class NodeList(PanelList, inherit_bindings=False):
    """Up and down, also j and k; Enter goes to the state."""

    chosen = "goto"

    BINDINGS: ClassVar[list[BindingType]] = [
        ("down,j", "cursor_down", "down"),
        ("up,k", "cursor_up", "up"),
        ("home,g", "first", "first"),
        ("end,G", "last", "last"),
        *bindings("history"),
    ]


class HistoryPanel(Panel):
    """The panel of the history tree."""

    panel = "history"
    title = "history"
    about = (
        "Every applied edit and every change of steering is a state in this tree; ● is the current "
        "one. {undo} moves to its parent, {redo} back again, {goto} to the selected state. An edit "
        "made after an undo starts a branch; the other branch is kept. Only an undo budget removes "
        "old branches, with a message. States are restored bit for bit.\n\n"
        "{mark} marks a state (◆) and {compare} compares the selected one with it, or with the "
        "current one: perplexity, KL, size and experts, measured on the same text. {name} names a "
        "state, {compact} frees the memory of pruned experts. The meter shows how much of the undo "
        "budget is in use."
    )

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[HistoryReport | None, int | None] | None = None

    def compose(self) -> ComposeResult:
        yield NodeList()
        yield Line(id="meter")

    def wanted(self) -> int:
        return self.query_one(NodeList).option_count + 3

    def entrance(self) -> Widget:
        return self.query_one(NodeList)

    @property
    def selected(self) -> int | None:
        """The id of the state under the cursor."""
        nodes = self.query_one(NodeList)
        option = nodes.highlighted_option
        return int(option.id) if option is not None and option.id else None

    def show(self, state: AppState) -> None:
        """Draw the tree of `state`."""
        self.entitle(state.names)
        undoes = hints.undoes(state) if not hints.why_not(state, BY_ID["undo"]) else ""
        self.subtitle(f"{state.names['undo']} undoes: {shortened(undoes, 60)}" if undoes else "")
        history, marked = state.view.history, state.marked
        before = self._shown
        if before is not None and before[0] is history and before[1] == marked:
            return
        self._shown = (history, marked)
        nodes = self.query_one(NodeList)
        selected = self.selected
        nodes.clear_options()
        if history is None:
            self.query_one("#meter", Line).put("")
            return
        lines = tree(history)
        nodes.add_options(
            Option(
                node_line(lead, node, node.id == history.current, node.id == marked),
                id=str(node.id),
            )
            for lead, node in lines
        )
        places = [node.id for _, node in lines]
        # Marking leaves the cursor alone; a change of the tree takes it to the model.
        wanted = selected if before is not None and before[0] is history else history.current
        if wanted in places:
            nodes.highlighted = places.index(wanted)
        self.query_one("#meter", Line).put(meter(history, max(20, self.size.width)))
