"""The history of a resident model: a tree of states joined by deltas.

Each edge holds one delta: the way to the parent while the model stands below the edge, the way to
the child while it stands above. Moving along the tree swaps deltas, so it is bit-exact. Tensors as
in the checkpoint are never held (they can be read back), so only tensors that an edit made count.

The budget bounds what a new step may add. Going back is never refused, even where redo then holds
more than the budget; a later step that needs the room drops branches that lead away from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlxfun.editing.plans import Plan, Provenance
from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.errors import BudgetError, StateError
from mlxfun.model.delta import Delta
from mlxfun.steering.rules import Steering
from mlxfun.text import readable_bytes

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Swap = Callable[[Delta], Delta]


@dataclass(slots=True)
class Node:
    """One state: weights (`state`) and the steering in force.

    edge: the delta of weights between this node and its parent, see the module's text; None where
    only the steering differs. recipe: the commands that make the weights from the parent's, the
    last one made the edit; empty without an edge. plan: what they decided, if it was a plan.
    made_on, protected: as in Provenance. label: what a person calls it.
    """

    id: int
    parent: Node | None
    command: str
    state: str
    recipe: tuple[str, ...]
    edge: Delta | None
    plan: Plan | None = None
    made_on: str = ""
    protected: Array | None = None
    steering: Steering = field(default_factory=Steering)
    scores: dict[str, float] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    label: str = ""

    @property
    def changes_weights(self) -> bool:
        """Whether its weights are not its parent's."""
        return self.edge is not None

    @property
    def steers_only(self) -> bool:
        """Whether it differs from its parent in the steering alone."""
        return self.parent is not None and self.edge is None


class History:
    """A tree with a place in it. `budget`: bytes of edit-made tensors it may hold, None: no limit."""

    def __init__(self, state: str, command: str, budget: int | None = None) -> None:
        self.root = Node(0, None, command, state, (), None)
        self.current = self.root
        self.budget = budget
        self._nodes: list[Node] = [self.root]
        self._last_child: dict[int, Node] = {}
        self._dropped: set[int] = set()  # numbers are not given out again

    @property
    def bytes_held(self) -> int:
        """Bytes of edit-made tensors in all edges."""
        return sum(map(_held, self._nodes))

    def room_for(self, command: str, state: str, more: int) -> list[Node]:
        """What has to go for a step from here that holds `more` bytes. Changes nothing.

        Branches that lead away from here, those in which no state has a name first, then the
        oldest. Raises BudgetError with the figures if the way from the root leaves too little.
        """
        if self.budget is None or more <= 0:
            return []
        path, again = self.ancestors(), self._child(command, state)
        needed = sum(map(_held, path)) + more
        if needed > self.budget:
            raise BudgetError(
                f"undoing this would need {readable_bytes(more)} on top of "
                f"{readable_bytes(needed - more)} held, over the undo budget of "
                f"{readable_bytes(self.budget)}; raise it with --undo-budget, or save and reload"
            )
        # A step that is taken again replaces the edge it made before.
        excess = self.bytes_held + more - self.budget - (_held(again) if again is not None else 0)
        others = [n for n in self._there() if n not in path and n is not again and _held(n)]
        others.sort(key=lambda node: (any(n.label for n in _branch(node)), node.id))
        going: list[Node] = []
        gone: set[int] = set()
        for node in others:
            if excess > 0 and node.id not in gone:
                fresh = [n for n in _branch(node) if n.id not in gone]
                gone |= {n.id for n in fresh}
                excess -= sum(map(_held, fresh))
                going.append(node)
        return going

    def drop(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """Forget branches, as `room_for` chose them; a sentence for each."""
        return tuple(map(self._drop, nodes))

    def _drop(self, node: Node) -> str:
        branch = _branch(node)
        held = sum(map(_held, branch))
        assert node.parent is not None
        node.parent.children.remove(node)
        if self._last_child.get(node.parent.id) is node:
            del self._last_child[node.parent.id]
        for gone in branch:
            gone.edge = gone.plan = None
            self._dropped.add(gone.id)
        beyond = f" with {len(branch) - 1} beyond it" if len(branch) > 1 else ""
        return (
            f"node {node.id} ({node.command}){beyond} is dropped from the history: "
            f"{readable_bytes(held)} to keep within the undo budget; its command makes it again"
        )

    def _there(self) -> list[Node]:
        return [node for node in self._nodes if node.id not in self._dropped]

    def _child(self, command: str, state: str, weights: bool = True) -> Node | None:
        """The child of the current node that `command` made before, with the same result."""
        wanted = (command, state, weights)
        same = (
            c for c in self.current.children if (c.command, c.state, c.changes_weights) == wanted
        )
        return next(same, None)

    def add(
        self,
        command: str,
        state: str,
        inverse: Delta | None,
        *,
        provenance: Provenance | None = None,
        plan: Plan | None = None,
        steering: Steering | None = None,
    ) -> Node:
        """A child of the current node, which becomes current. `inverse` leads back, None where the
        weights are the same.

        Doing the same again from the same node finds the node that is already there, so that
        repeating apply and undo does not grow the tree. Ask `room_for` before the model is
        changed: this never refuses, as a step that is taken has to be on record.
        """
        source = provenance or Provenance(command)
        recipe = () if inverse is None else (*source.source_commands, command)
        node = self._child(command, state, inverse is not None)
        if node is None:
            node = Node(len(self._nodes), self.current, command, state, recipe, inverse, plan)
            self.current.children.append(node)
            self._nodes.append(node)
        node.edge, node.recipe = inverse, recipe
        node.made_on, node.protected = source.made_on, source.protected
        node.steering = steering or Steering()
        self._arrive(node)
        return node

    def beyond(self, state: str, provenance: Provenance, plan: Plan) -> Node:
        """The child of the current node that applying a plan would make; the tree stays as it is."""
        command = provenance.command
        recipe = (*provenance.source_commands, command)
        node = Node(len(self._nodes), self.current, command, state, recipe, None, plan)
        node.made_on, node.protected = provenance.made_on, provenance.protected
        node.scores.update(provenance.scores)
        return node

    def _arrive(self, node: Node) -> None:
        self.current = node
        if node.parent is not None:
            self._last_child[node.parent.id] = node

    def undo(self, swap: Swap) -> Node:
        """Go to the parent. Raises StateError at the root."""
        node = self.current
        if node.parent is None:
            raise StateError("nothing to undo: the model is as it was loaded")
        if node.edge is not None:
            node.edge = swap(node.edge)
        self.current = node.parent
        return self.current

    def redo(self, swap: Swap) -> Node:
        """Go to the child last visited. Raises StateError without one."""
        if not self.current.children:
            raise StateError("nothing to redo: no edit was undone here")
        return self._down(self._last_child.get(self.current.id, self.current.children[-1]), swap)

    def _down(self, child: Node, swap: Swap) -> Node:
        if child.edge is not None:
            child.edge = swap(child.edge)
        self._arrive(child)
        return child

    def goto(self, node_id: int, swap: Swap, back: Swap | None = None) -> Node:
        """Go to any node by way of the common ancestor; a failure half-way goes back.

        back: what takes the way back, where `swap` can be cancelled: a cancel that stopped the way
        there would stop the way back as well.
        """
        start, visited, target = self.current, dict(self._last_child), self._require(node_id)
        try:
            self._walk(target, swap)
        except BaseException:
            self._walk(start, back or swap)
            self._last_child = visited
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
        if node_id in self._dropped:
            raise StateError(
                f"node {node_id} was dropped to keep within the undo budget; make it again with "
                f"{self._nodes[node_id].command}"
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

    def ancestors(self, end: Node | None = None) -> list[Node]:
        """From the root to `end`, by default the current node."""
        chain = []
        node: Node | None = end or self.current
        while node is not None:
            chain.append(node)
            node = node.parent
        return chain[::-1]

    @property
    def protected(self) -> Array | None:
        """The experts that the newest plan on the way here which takes a list was told to spare."""
        masks = (node.protected for node in reversed(self.ancestors()))
        return next((mask for mask in masks if mask is not None), None)

    def recipe(self, end: Node | None = None) -> list[str]:
        """The commands that make the state of `end`, by default the current one, out of the
        checkpoint.

        Statistics are collected at the state they were made on, once, however many decisions they
        served; all else that an edit rests on comes right before it, each time.
        """
        path = self.ancestors(end)
        collected: list[list[str]] = [[] for _ in path]
        edits: list[list[str]] = [[] for _ in path]
        for place, node in enumerate(path[1:]):
            if not node.recipe:
                continue
            *sources, command = node.recipe
            states = [before.state for before in path[: place + 1]]
            if node.made_on:
                at = states.index(node.made_on) if node.made_on in states else place
                there = collected[at]
                known = there[: len(sources)] == sources
                more = sources[: len(there)] == there
                there += [] if known else sources[len(there) :] if more else sources
                sources = []
            edits[place] = [*sources, command]
        pairs = zip(collected, edits, strict=True)
        return [line for ahead, edit in pairs for line in (*ahead, *edit)]

    def report(self) -> HistoryReport:
        """The tree as data."""
        nodes = tuple(
            HistoryNode(
                node.id,
                node.parent.id if node.parent is not None else None,
                node.command,
                node.state,
                _held(node),
                dict(node.scores),
                node.label,
                node.steering.brief,
            )
            for node in self._there()
        )
        return HistoryReport(nodes, self.current.id, self.bytes_held, self.budget)


def _held(node: Node) -> int:
    """Bytes of edit-made tensors in the node's edge."""
    return node.edge.bytes if node.edge is not None else 0


def _branch(node: Node) -> list[Node]:
    """A node and all beyond it."""
    return [node, *(n for child in node.children for n in _branch(child))]
