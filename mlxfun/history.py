"""The history of a resident model: a tree of states joined by deltas.

Each edge holds one delta: the way to the parent while the model stands below the edge, the way to
the child while it stands above. Moving along the tree swaps deltas, so it is bit-exact. Tensors as
in the checkpoint are never held (they can be read back), so only tensors that an edit made count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlxfun.deltas import Delta
from mlxfun.errors import BudgetError, MlxfunError, StateError
from mlxfun.plans import Plan
from mlxfun.reports import HistoryNode, HistoryReport, readable_bytes

Swap = Callable[[Delta], Delta]


@dataclass(slots=True)
class Node:
    """One state. edge: the delta between this node and its parent, see the module's text.

    recipe: the commands that lead here from the parent; plan: what they decided, if it was a plan.
    label: what a person calls it.
    """

    id: int
    parent: Node | None
    command: str
    state: str
    recipe: tuple[str, ...]
    edge: Delta | None
    plan: Plan | None = None
    scores: dict[str, float] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    label: str = ""


class History:
    """A tree with a place in it. `budget`: bytes of edit-made tensors it may hold, None: no limit."""

    def __init__(self, state: str, command: str, budget: int | None = None) -> None:
        self.root = Node(0, None, command, state, (), None)
        self.current = self.root
        self.budget = budget
        self._nodes: list[Node] = [self.root]
        self._last_child: dict[int, Node] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of edit-made tensors in all edges."""
        return sum(node.edge.bytes for node in self._nodes if node.edge is not None)

    def check_budget(self, more: int) -> None:
        """Raise BudgetError with the figures if `more` bytes do not fit."""
        if self.budget is not None and self.bytes_held + more > self.budget:
            raise BudgetError(
                f"undoing this would need {readable_bytes(more)} on top of "
                f"{readable_bytes(self.bytes_held)} held, over the undo budget of "
                f"{readable_bytes(self.budget)}; raise it with --undo-budget, or save and reload"
            )

    def add(
        self,
        command: str,
        state: str,
        inverse: Delta,
        *,
        evidence: tuple[str, ...] = (),
        plan: Plan | None = None,
    ) -> Node:
        """A child of the current node, which becomes current. `inverse` leads back.

        Doing the same again from the same node finds the node that is already there, so that
        repeating apply and undo does not grow the tree. evidence: the commands that made the
        statistics it was decided on.
        """
        for child in self.current.children:
            if child.state == state and child.command == command:
                child.edge, child.recipe = inverse, (*evidence, command)
                self._arrive(child)
                return child
        self.check_budget(inverse.bytes)
        recipe = (*evidence, command)
        node = Node(len(self._nodes), self.current, command, state, recipe, inverse, plan)
        self.current.children.append(node)
        self._nodes.append(node)
        self._arrive(node)
        return node

    def _arrive(self, node: Node) -> None:
        self.current = node
        if node.parent is not None:
            self._last_child[node.parent.id] = node

    def undo(self, swap: Swap) -> Node:
        """Go to the parent. Raises StateError at the root."""
        node = self.current
        if node.parent is None or node.edge is None:
            raise StateError("nothing to undo: the model is as it was loaded")
        node.edge = swap(node.edge)
        self.current = node.parent
        return self.current

    def redo(self, swap: Swap) -> Node:
        """Go to the child last visited. Raises StateError without one."""
        if not self.current.children:
            raise StateError("nothing to redo: no edit was undone here")
        return self._down(self._last_child.get(self.current.id, self.current.children[-1]), swap)

    def _down(self, child: Node, swap: Swap) -> Node:
        if child.edge is None:
            raise RuntimeError(f"history node {child.id} has no edge")
        child.edge = swap(child.edge)
        self._arrive(child)
        return child

    def goto(self, node_id: int, swap: Swap) -> Node:
        """Go to any node by way of the common ancestor; a failure half-way goes back."""
        start, target = self.current, self._require(node_id)
        try:
            self._walk(target, swap)
        except MlxfunError:
            self._walk(start, swap)
            raise
        return self.current

    def name(self, node_id: int, label: str) -> None:
        """Call a node `label`; "" takes the name away. Raises StateError for an unknown node."""
        self._require(node_id).label = label

    def _require(self, node_id: int) -> Node:
        if not 0 <= node_id < len(self._nodes):
            raise StateError(
                f"there is no history node {node_id}; they are 0..{len(self._nodes) - 1}"
            )
        return self._nodes[node_id]

    @contextmanager
    def excursion(self, swap: Swap) -> Iterator[None]:
        """Whatever is gone to inside the block, afterwards the model is where it was, and redo
        leads where it did."""
        here, visited = self.current, dict(self._last_child)
        try:
            yield
        finally:
            self._walk(here, swap)
            self._last_child = visited

    def _walk(self, target: Node, swap: Swap) -> None:
        chain = []
        node: Node | None = target
        while node is not None:
            chain.append(node)
            node = node.parent
        while self.current not in chain:
            self.undo(swap)
        for child in reversed(chain[: chain.index(self.current)]):
            self._down(child, swap)

    def ancestors(self) -> list[Node]:
        """From the root to the current node."""
        chain = []
        node: Node | None = self.current
        while node is not None:
            chain.append(node)
            node = node.parent
        return chain[::-1]

    def report(self) -> HistoryReport:
        """The tree as data."""
        nodes = tuple(
            HistoryNode(
                node.id,
                node.parent.id if node.parent is not None else None,
                node.command,
                node.state,
                node.edge.bytes if node.edge is not None else 0,
                dict(node.scores),
                node.label,
            )
            for node in self._nodes
        )
        return HistoryReport(nodes, self.current.id, self.bytes_held, self.budget)
