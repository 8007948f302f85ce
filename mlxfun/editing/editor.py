"""The editable model: committed state, at most one staged candidate, and the history.

Every change goes through `Resident.swap`. While a plan is staged the candidate is live by default;
`flip` chooses the side, `live` borrows a side for a measurement and always gives it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.editing.history import History, Node
from mlxfun.editing.plans import Plan
from mlxfun.editing.reports import PlanReport, StepReport
from mlxfun.errors import StateError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import Notice
from mlxfun.model.compact import compact_delta
from mlxfun.model.delta import Delta, Resident
from mlxfun.model.identity import state_id
from mlxfun.steering import rules as steer
from mlxfun.steering.rules import Steering

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Live = tuple[tuple[int, ...], ...]
"""The live experts of each MoE layer, [L][kept]."""


@dataclass(slots=True)
class Staged:
    """A candidate. edge: the delta to the side that is not live now. base: experts before it.

    evidence: the commands that made what it was decided on; made_on: the state that they looked
    at, "" for the one it is staged on. protected: bool [L, E], whom it was told to spare, None for
    a plan that cannot be told. scores: what was measured while it was planned. preview: the newest
    measurement, by the options in asked. steering: what the plan makes permanent, in force on the
    base's side only.
    """

    plan: Plan
    command: str
    edge: Delta
    state: str
    base: Live
    report: PlanReport
    live: bool = True
    evidence: tuple[str, ...] = ()
    made_on: str = ""
    protected: Array | None = None
    preview: EvaluateReport | None = None
    asked: EvaluateOptions | None = None
    scores: dict[str, float] = field(default_factory=dict)
    steering: Steering | None = None


class Editor:
    """Stage, flip, apply, undo: where the model stands and how it gets elsewhere."""

    def __init__(
        self, resident: Resident, checkpoint_id: str, command: str, budget: int | None
    ) -> None:
        self.resident = resident
        self.steering = Steering()
        self.staged: Staged | None = None
        self.checkpoint_id = checkpoint_id
        self.model_name = ""
        self.history = History(self._live_state(), command, budget)

    # -- where the model stands ---------------------------------------------------------------

    def _live_state(self) -> str:
        return state_id(self.checkpoint_id, self.resident.ledger)

    @property
    def state(self) -> str:
        """The committed state."""
        return self.history.current.state

    @property
    def live_state(self) -> str:
        """The state of the side that would run now."""
        staged = self.staged
        return staged.state if staged is not None and staged.live else self.state

    @property
    def side(self) -> str:
        """ "candidate" or "base"."""
        return "candidate" if self.staged is not None and self.staged.live else "base"

    @property
    def committed(self) -> Live:
        """The live experts of the committed state."""
        if self.staged is not None and self.staged.live:
            return self.staged.base
        return tuple(tap.live for tap in self.resident.taps.layers)

    @property
    def protected(self) -> Array | None:
        """Whom the newest plan that could be told was told to spare, bool [L, E], None without one.

        That is the staged plan, or one that was applied on the way to where the model stands. What
        was discarded or undone protects nobody any more.
        """
        if self.staged is not None and self.staged.protected is not None:
            return self.staged.protected
        return self.history.protected

    def steering_of(self, side: str) -> Steering:
        """What steers a side of `live` while it runs. A plan that makes steering permanent has it
        in force on the committed side only, also while the candidate is live.
        """
        if side == "checkpoint":
            return Steering()
        staged = self.staged
        if staged is None or staged.steering is None:
            return self.steering
        return Steering() if side == "staged" else staged.steering

    def key(self) -> tuple[str, str]:
        """What a KV cache is valid for: weights and steering in force."""
        return self.live_state, self.steering.key

    # -- moving -------------------------------------------------------------------------------

    def swap(self, delta: Delta, ctx: Context = SILENT) -> Delta:
        """Swap and put the steering in force on what is live then."""
        inverse = self.resident.swap(delta, ctx)
        steer.install(self.steering, self.resident)
        return inverse

    def set_steering(self, steering: Steering) -> None:
        """Replace the steering; the next forward follows it."""
        self.steering = steering
        steer.install(steering, self.resident)

    def require_staged(self, action: str) -> Staged:
        """The staged plan. Raises StateError without one."""
        if self.staged is None:
            raise StateError(f"nothing is staged to {action}; stage a plan first, e.g. with prune")
        return self.staged

    def require_unstaged(self, action: str) -> None:
        """Raise StateError while a plan is staged."""
        if self.staged is not None:
            raise StateError(
                f"a plan is staged ({self.staged.command}); apply or discard it before {action}"
            )

    def stage(self, plan: Plan, delta: Delta, command: str, report: PlanReport) -> Staged:
        """Swap a candidate in. The committed side must be live and nothing staged."""
        base = self.committed
        edge = self.swap(delta)
        state = self._live_state()
        report = replace(report, state_after=state, peak_bytes=int(mx.get_peak_memory()))
        self.staged = Staged(plan, command, edge, state, base, report)
        return self.staged

    def replace_steering(self, steering: Steering) -> None:
        """The staged plan does what `steering` did: off on its side, in force on the base's."""
        staged = self.require_staged("replace the steering of")
        staged.steering = steering
        self._steer_side(staged)

    def require_steerable(self) -> None:
        """Raise StateError while a plan that replaces the steering is staged."""
        if self.staged is not None and self.staged.steering is not None:
            raise StateError(
                "the steering is staged to be baked; apply or discard that before steering on"
            )

    def _steer_side(self, staged: Staged) -> None:
        if staged.steering is not None:
            self.set_steering(Steering() if staged.live else staged.steering)

    def flip(self, side: str | None = None) -> StepReport:
        """Make the other side (or the named one) live: references are swapped, nothing copied."""
        staged = self.require_staged("flip")
        began = perf_counter()
        if side is None or side != self.side:
            staged.edge = self.swap(staged.edge)
            staged.live = not staged.live
            self._steer_side(staged)
        return self._step("flip", f"{self.side} is live", self.state, began)

    def discard(self) -> StepReport:
        """Drop the staged plan; the committed side is live."""
        staged = self.require_staged("discard")
        began = perf_counter()
        if staged.live:
            self.swap(staged.edge)
            if staged.steering is not None:
                self.set_steering(staged.steering)
        self.staged = None
        return self._step("discard", staged.command, self.state, began)

    def apply(self, scores: dict[str, float], ctx: Context = SILENT) -> StepReport:
        """Commit the staged plan as a history node. Raises BudgetError, and changes nothing."""
        staged = self.require_staged("apply")
        before, began = self.state, perf_counter()
        edge = staged.edge
        held = edge.bytes if staged.live else self.resident.made_bytes(edge)
        going = self.history.room_for(staged.command, staged.state, held)
        if not staged.live:
            self.flip("candidate")
        # From here on undo leads back: what the checkpoint holds need not be held for it.
        staged.edge = self.resident.released(staged.edge)
        node = self.history.add(
            staged.command,
            staged.state,
            staged.edge,
            evidence=staged.evidence,
            plan=staged.plan,
        )
        node.made_on, node.protected = staged.made_on, staged.protected
        node.scores.update({**staged.scores, **scores})
        self.staged = None
        self._drop(going, ctx)
        return self._step("apply", node.command, before, began)

    def _drop(self, nodes: list[Node], ctx: Context) -> None:
        for sentence in self.history.drop(nodes):
            ctx.emit(Notice("warning", sentence))

    def undo(self) -> StepReport:
        """Back to the parent state, bit for bit."""
        self.require_unstaged("undo")
        undone, before, began = self.history.current.command, self.state, perf_counter()
        self.history.undo(self.swap)
        return self._step("undo", undone, before, began)

    def redo(self) -> StepReport:
        """Forward to the state last visited from here."""
        self.require_unstaged("redo")
        before, began = self.state, perf_counter()
        node = self.history.redo(self.swap)
        return self._step("redo", node.command, before, began)

    def goto(self, node: int, ctx: Context = SILENT) -> StepReport:
        """To any state of the tree."""
        self.require_unstaged("goto")
        before, began = self.state, perf_counter()
        arrived = self.history.goto(node, lambda delta: self.swap(delta, ctx), self.swap)
        return self._step("goto", arrived.command, before, began)

    def compact(self, command: str, ctx: Context = SILENT) -> StepReport:
        """Slice the expert stacks to what is live; undo reads the rest back from the checkpoint."""
        self.require_unstaged("compact")
        before, began = self.state, perf_counter()
        delta = compact_delta(self.resident)
        if not delta.layers:
            raise StateError(
                "nothing to compact: no pruned experts are held in memory; apply a prune first"
            )
        self.resident.require_checkpoint()
        state = self._live_state()  # of the live experts, so slicing the rest away keeps it
        going = self.history.room_for(command, state, self.resident.made_bytes(delta))
        held = _bytes(self.resident)
        inverse = self.swap(delta, ctx)
        self.history.add(command, state, inverse)
        self._drop(going, ctx)
        mx.clear_cache()
        step = self._step("compact", command, before, began)
        return replace(step, bytes_freed=held - _bytes(self.resident))

    def _step(self, action: str, command: str, before: str, began: float) -> StepReport:
        return StepReport(
            action=action,
            node=self.history.current.id,
            command=command,
            state_before=before,
            state_after=self.state,
            live=self.side,
            bytes_held=self.history.bytes_held,
            milliseconds=(perf_counter() - began) * 1000,
        )

    # -- borrowing a side ---------------------------------------------------------------------

    @contextmanager
    def live(self, side: str) -> Iterator[None]:
        """Make "checkpoint", "current" or "staged" live inside the block.

        The checkpoint is run without steering: it is what the others are compared with.
        """
        staged = self.staged
        want = side == "staged"
        if want and staged is None:
            raise StateError("nothing is staged")
        flipped = staged is not None and staged.live != want
        if flipped:
            self.flip()
        try:
            if side == "checkpoint":
                with self._at_root():
                    yield
            else:
                yield
        finally:
            if flipped:
                self.flip()

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """No steering inside the block."""
        steering = self.steering
        self.set_steering(Steering())
        try:
            yield
        finally:
            self.set_steering(steering)

    def edits_to_root(self) -> tuple[bool, ...]:
        """For each edit between the current state and the checkpoint, the newest first, whether
        taking it back reads tensors from the checkpoint's files."""
        return tuple(edge.release for edge in self._edges_to_root())

    def _edges_to_root(self) -> Iterator[Delta]:
        node: Node | None = self.history.current
        while node is not None and node.edge is not None and node.parent is not None:
            yield node.edge
            node = node.parent

    @contextmanager
    def _at_root(self) -> Iterator[None]:
        back: list[Delta] = []
        with self.unsteered():
            try:
                for edge in self._edges_to_root():
                    back.append(self.swap(edge))  # noqa: PERF401 - what a failure has to take back
                yield
            finally:
                for delta in reversed(back):
                    self.swap(delta)


def _bytes(resident: Resident) -> int:
    """Bytes of the expert stacks in memory."""
    return sum(
        resident.tree.get(p.path).nbytes
        for tap in resident.taps.layers
        for p in tap.layer.expert_parameters()
    )
