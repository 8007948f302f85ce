"""The editable model: committed state, at most one staged candidate, and the history.

A state is weights and interventions (steering). Every change of weights goes through
`Resident.swap`. While a plan is staged the candidate is live by default; `flip` chooses the side.
`live` and `unsteered` borrow another state for a while and always give it back, as `Resident.trial`
does; `key()` names what is live at any moment, also while something is borrowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.editing.earlier import EarlierNames
from mlxfun.editing.history import History, Node
from mlxfun.editing.plans import Plan, Provenance, Subject
from mlxfun.editing.replaced import ReplacedTensors
from mlxfun.editing.reports import PlanReport, StepAction, StepReport
from mlxfun.errors import StateError
from mlxfun.events import Notice, Side
from mlxfun.hooks.routing import Taps
from mlxfun.model.delta import Delta, Resident
from mlxfun.model.identity import state_id
from mlxfun.model.slicing import compact_delta
from mlxfun.steering import rules as steer
from mlxfun.steering.rules import Steering
from mlxfun.tracing.standing import Standing

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Live = tuple[tuple[int, ...], ...]
"""The live experts of each MoE layer, [L][kept]."""


@dataclass(slots=True)
class Staged:
    """A candidate. edge: the delta to the side that is not live now. base: live experts before it.

    live: whether the candidate is the side that is live. report: complete when it is staged.
    """

    plan: Plan
    provenance: Provenance
    edge: Delta
    state: str
    base: Live
    report: PlanReport
    live: bool = True

    @property
    def command(self) -> str:
        """The line that staged it."""
        return self.provenance.command

    @property
    def steering(self) -> Steering | None:
        """What the plan makes permanent, None for nothing."""
        return self.provenance.steering


class Editor:
    """Stage, flip, apply, undo: where the model stands and how it gets elsewhere."""

    def __init__(
        self, resident: Resident, taps: Taps, checkpoint_id: str, command: str, budget: int | None
    ) -> None:
        self.resident = resident
        self._taps = taps
        self.steering = Steering()
        self.standing: Standing | None = None
        self.staged: Staged | None = None
        self.checkpoint_id = checkpoint_id
        self.model_name = ""
        self.earlier = EarlierNames()  # before the first state is named
        self.steering_in_history = True
        self._identity = (-1, "")  # (version of the resident weights, their state)
        self.history = History(self.live_state, command, budget)
        self.replaced = ReplacedTensors(resident, self.history)

    # -- where the model stands ---------------------------------------------------------------

    @property
    def state(self) -> str:
        """The committed state."""
        return self.history.current.state

    @property
    def live_state(self) -> str:
        """The state of the weights that would run now, also while another side is borrowed."""
        if self._identity[0] != self.resident.version:
            state = state_id(self.checkpoint_id, self.resident.ledger)
            self.earlier.note(state, self.resident.ledger)
            self._identity = (self.resident.version, state)
        return self._identity[1]

    @property
    def root_state(self) -> str:
        """The checkpoint's own state."""
        return self.history.root.state

    @property
    def side(self) -> Side:
        """Which side is live while a plan is staged; "base" without one."""
        return "candidate" if self.staged is not None and self.staged.live else "base"

    @property
    def committed(self) -> Live:
        """The live experts of the committed state."""
        if self.staged is not None and self.staged.live:
            return self.staged.base
        return tuple(moe.live for moe in self.resident.layers)

    @property
    def protected(self) -> Array | None:
        """The experts that the newest plan which takes such a list was told to spare, bool [L, E].

        That is the staged plan, or one that was applied on the way to where the model stands; None
        without one. What was discarded or undone protects no expert any more.
        """
        if self.staged is not None and self.staged.provenance.protected is not None:
            return self.staged.provenance.protected
        return self.history.protected

    def steering_of(self, subject: Subject) -> Steering:
        """What steers a subject of `live` while it runs. A plan that makes steering permanent has
        it in force on the base's side only, also while the candidate is live.
        """
        if subject == "checkpoint":
            return Steering()
        staged = self.staged
        if staged is None or staged.steering is None:
            return self.steering
        return Steering() if subject == "candidate" else staged.steering

    def key(self) -> tuple[str, str]:
        """What a KV cache is valid for: weights and steering in force."""
        return self.live_state, self.steering.key

    # -- moving -------------------------------------------------------------------------------

    def swap(self, delta: Delta, ctx: Context = SILENT) -> Delta:
        """Swap and put the steering in force on what is live then."""
        inverse = self.resident.swap(delta, ctx)
        steer.install(self.steering, self.resident, self._taps)
        return inverse

    def set_steering(self, steering: Steering) -> None:
        """Replace the steering; the next forward follows it."""
        self.steering = steering
        steer.install(steering, self.resident, self._taps)
        if self.standing is not None:
            self.standing.install(steering.interventions)

    def require_staged(self, action: str) -> Staged:
        """The staged plan. Raises StateError without one."""
        if self.staged is None:
            how = "prune" if self.resident.layers else "abliterate"
            raise StateError(f"nothing is staged to {action}; stage a plan first, e.g. with {how}")
        return self.staged

    def require_unstaged(self, action: str) -> None:
        """Raise StateError while a plan is staged."""
        if self.staged is not None:
            raise StateError(
                f"a plan is staged ({self.staged.command}); apply or discard it before {action}"
            )

    def stage(
        self,
        plan: Plan,
        delta: Delta,
        provenance: Provenance,
        report: Callable[[str], PlanReport],
    ) -> Staged:
        """Swap a candidate in. The base must be live and nothing staged.

        report: (state) -> the finished report, called while the candidate is live. A failure in it
        leaves the model as it was.
        """
        base = self.committed
        edge = self.swap(delta)
        try:
            made = report(self.live_state)
        except BaseException:
            self.swap(edge)
            raise
        self.staged = Staged(plan, provenance, edge, self.live_state, base, made)
        self._steer_side(self.staged)
        return self.staged

    def require_steerable(self) -> None:
        """Raise StateError while a plan that replaces the steering is staged."""
        if self.staged is not None and self.staged.steering is not None:
            raise StateError(
                "the steering is staged to be baked; apply or discard that before steering on"
            )

    def _steer_side(self, staged: Staged) -> None:
        if staged.steering is not None:
            self.set_steering(Steering() if staged.live else staged.steering)

    def flip(self, side: Side | None = None) -> StepReport:
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

    def apply(self, scores: Mapping[str, float], ctx: Context = SILENT) -> StepReport:
        """Commit the staged plan as a history node. Raises BudgetError, and changes nothing."""
        staged = self.require_staged("apply")
        before, began = self.state, perf_counter()
        edge = staged.edge
        held = edge.bytes if staged.live else self.resident.made_bytes(edge)
        going = self.history.room_for(staged.command, staged.state, held)
        if not staged.live:
            self.flip("candidate")
        # From here on undo leads back: what the checkpoint holds need not be held for it.
        staged.edge, reads = self.replaced.kept_or_released(staged.edge)
        node = self.history.add(
            staged.command,
            staged.state,
            staged.edge,
            provenance=staged.provenance,
            plan=staged.plan,
            steering=self.steering,
        )
        node.scores.update({**staged.provenance.scores, **scores})
        self.staged = None
        self._drop(going, ctx)
        step = self._step("apply", node.command, before, began)
        return replace(step, undo_reads=reads, undo_seconds=reads / self.replaced.read_rate)

    def steer(self, steering: Steering, command: str) -> None:
        """Replace the steering as a step of the history, which undo takes back.

        Steering that changes nothing is no step. Recordings made before steering was part of the
        history turn that off with `steering_in_history`.
        """
        changed = steering.key != self.history.current.steering.key
        self.set_steering(steering)
        if changed and self.steering_in_history:
            self.history.add(command, self.state, None, steering=steering)
        else:
            self.history.current.steering = steering

    def _drop(self, nodes: list[Node], ctx: Context) -> None:
        for sentence in self.history.drop(nodes):
            ctx.emit(Notice("warning", sentence))

    def undo(self, ctx: Context = SILENT) -> StepReport:
        """Back to the parent state, weights bit for bit and steering as it was.

        Shows progress where tensors are read back from the checkpoint; a cancel stays where it was.

        While a plan is staged only a step that changed nothing but the steering can be undone.
        """
        if not (self.history.current.steers_only and self.steering_in_history):
            self.require_unstaged("undo")
        self.require_steerable()
        undone, before, began = self.history.current.command, self.state, perf_counter()
        self.history.undo(lambda delta: self.swap(delta, ctx))
        self._arrived()
        return self._step("undo", undone, before, began)

    def redo(self, ctx: Context = SILENT) -> StepReport:
        """Forward to the state last visited from here."""
        self.require_unstaged("redo")
        before, began = self.state, perf_counter()
        node = self.history.redo(lambda delta: self.swap(delta, ctx))
        self._arrived()
        return self._step("redo", node.command, before, began)

    def goto(self, node: int, ctx: Context = SILENT) -> StepReport:
        """To any state of the tree."""
        self.require_unstaged("goto")
        before, began = self.state, perf_counter()
        arrived = self.history.goto(node, lambda delta: self.swap(delta, ctx), self.swap)
        self._arrived()
        return self._step("goto", arrived.command, before, began)

    def _arrived(self) -> None:
        """Put the steering of the state that was gone to in force."""
        if self.steering_in_history:
            self.set_steering(self.history.current.steering)
        else:
            self.history.current.steering = self.steering

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
        state = self.live_state  # of the live experts, so slicing the rest away keeps it
        going = self.history.room_for(command, state, self.resident.made_bytes(delta))
        held = self.resident.expert_bytes
        inverse = self.swap(delta, ctx)
        self.history.add(command, state, inverse, steering=self.steering)
        self._drop(going, ctx)
        mx.clear_cache()
        step = self._step("compact", command, before, began)
        return replace(step, bytes_freed=held - self.resident.expert_bytes)

    def _step(self, action: StepAction, command: str, before: str, began: float) -> StepReport:
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
    def live(self, subject: Subject) -> Iterator[None]:
        """Make "checkpoint", "base" or "candidate" live inside the block.

        The checkpoint is run without steering: it is what the others are compared with. Raises
        StateError for a candidate that is not staged.
        """
        staged = self.staged
        want = subject == "candidate"
        if want and staged is None:
            raise StateError("nothing is staged")
        flipped = staged is not None and staged.live != want
        if flipped:
            self.flip()
        try:
            if subject == "checkpoint":
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
        """For each of `edges_to_root`, whether taking it back reads the checkpoint's files."""
        return tuple(edge.release for edge in self.edges_to_root())

    def edges_to_root(self) -> Iterator[Delta]:
        """The edits between the current state and the checkpoint, the newest first."""
        node: Node | None = self.history.current
        while node is not None:
            if node.edge is not None:
                yield node.edge
            node = node.parent

    @contextmanager
    def _at_root(self) -> Iterator[None]:
        back: list[Delta] = []
        with self.unsteered():
            try:
                for edge in self.edges_to_root():
                    back.append(self.swap(edge))  # noqa: PERF401 - what a failure has to take back
                yield
            finally:
                for delta in reversed(back):
                    self.swap(delta)
