"""The tree of states: every committed edit, where the model is, and what each state scored."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widget import Widget
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from mlxfun.reports import HistoryNode, HistoryReport, readable_bytes
from tui.keymap import bindings
from tui.messages import KeyUsed
from tui.state import AppState
from tui.text import tree
from tui.widgets.panel import Panel

SHORT = {"perplexity": "ppl", "kl_mean": "KL", "top1_agreement": "top-1"}


def node_line(lead: str, node: HistoryNode, current: bool) -> Text:
    """One state: its place in the tree, what made it, and its figures."""
    text = Text(lead, style="dim", no_wrap=True, overflow="ellipsis")
    text.append("● " if current else "○ ", "bold" if current else "")
    text.append(f"{node.id} ", "bold" if current else "dim not bold")
    text.append(node.command, "bold not dim" if current else "not dim")
    text.append(f"  {node.state[:8]}", "dim")
    if node.bytes:
        text.append(f"  {readable_bytes(node.bytes)}", "dim")
    for name, value in node.scores.items():
        text.append(f"  {SHORT.get(name, name)} {value:.4g}", "dim")
    return text


class NodeList(OptionList, inherit_bindings=False):
    """Up and down, also j and k; Enter goes to the state."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("down,j", "cursor_down", "down"),
        ("up,k", "cursor_up", "up"),
        ("home,g", "first", "first"),
        ("end,G", "last", "last"),
        *bindings("history"),
    ]

    DEFAULT_CSS = """
    NodeList, NodeList:focus { border: none; padding: 0; height: 1fr; background: $background;
                               background-tint: $foreground 0%; text-wrap: nowrap;
                               text-overflow: ellipsis;
                               scrollbar-size-vertical: 1; }
    """

    def action_select(self) -> None:
        # A mouse click selects; the key does the same through the keymap.
        self.post_message(KeyUsed("goto"))


class HistoryPanel(Panel):
    """Undo as a tree."""

    panel = "history"
    title = "history"
    about = (
        "Every committed edit is a state in this tree; ● is where the model is. u goes one up, "
        "r down again, Enter goes straight to the selected state. An edit made after an undo "
        "starts a branch: nothing is lost. States are restored bit for bit."
    )

    def __init__(self) -> None:
        super().__init__()
        self._shown: HistoryReport | None = None

    def compose(self) -> ComposeResult:
        yield NodeList()

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
        history = state.view.history
        if history is self._shown:
            return
        self._shown = history
        nodes = self.query_one(NodeList)
        nodes.clear_options()
        if history is None:
            self.subtitle("")
            return
        lines = tree(history)
        nodes.add_options(
            Option(node_line(lead, node, node.id == history.current), id=str(node.id))
            for lead, node in lines
        )
        places = [node.id for _, node in lines]
        if history.current in places:
            nodes.highlighted = places.index(history.current)
        self.subtitle(self._held(history))

    @staticmethod
    def _held(history: HistoryReport) -> str:
        limit = f" of {readable_bytes(history.budget)}" if history.budget is not None else ""
        return f"undo holds {readable_bytes(history.bytes_held)}{limit}"
