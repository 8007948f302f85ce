"""Bake of steering vectors: what is added to a value at every token, written into a bias.

    y = W x + b, and y + s v at every token, is W x + (b + s v)

That is exact where what writes the value has a bias and nothing scales or normalises it behind
that: so a part counts only if the value, with the new bias and without the intervention, is what it
was with the intervention, on a probe of tokens. A weight without bias has no constant to take the
vector: W x follows x. A normalised output loses a constant's length. Then it is refused, in words.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.editing.plans import Provenance
from mlxfun.editing.reports import PlanReport, extended
from mlxfun.errors import ModelError, PlanError, StateError
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.identity import Rows
from mlxfun.model.model_map import ModelMap
from mlxfun.model.outputs import residual_outputs
from mlxfun.model.parameters import rounded, whole_digest
from mlxfun.steering.rules import Steering
from mlxfun.techniques.router_bias.options import BakeOptions
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.vector_bias.plan import VectorPlan
from mlxfun.techniques.vector_bias.reports import Held, VectorReport
from mlxfun.techniques.workspace import Workspace
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.names import Point
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.prompts import padded
from mlxfun.tracing.standing import Placed
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.values import Saved, on_host

PROBE = 24
"""Tokens on which a bias is compared with the intervention."""
COMPONENTS = {"residual": ("dense", "shared", "attention"), "mlp.output": ("dense", "shared"),
              "attn.output": ("attention",)}  # fmt: skip
"""{value of a layer: parts that write it, the last one first}."""


class BakeVectors:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Any model may have biases."""

    def plan(
        self, workspace: Workspace, options: BakeOptions, command: str = "", ctx: Context = SILENT
    ) -> Proposal:
        """The vectors in force as new biases: off on the candidate's side, in force on the base's,
        and taken away when the plan is applied. Raises PlanError for what no bias can hold."""
        editor = workspace.editor
        with editor.live("base"):
            steering = editor.steering
            lines = tuple(_line(placed) for placed in steering.interventions)
            require_only_vectors(steering)
            with editor.unsteered():
                baker = _Baker(workspace)
                for placed in steering.interventions:
                    ctx.check()
                    baker.take(placed)
                delta = baker.delta()
        keep = dict(zip(workspace.anatomy.indices, editor.committed, strict=True))
        plan = VectorPlan(keep, tuple(baker.held))
        provenance = Provenance(command or "bake", source_commands=lines, steering=steering)

        def describe(report: PlanReport) -> PlanReport:
            return extended(VectorReport, report, held=plan.held)

        return Proposal(plan, delta, provenance, describe=describe)


def require_only_vectors(steering: Steering) -> None:
    """Raise StateError where experts are steered as well, PlanError for what is no constant."""
    if any(map(any, (steering.activate.values(), steering.deactivate.values(),
                     steering.levels.values()))):  # fmt: skip
        raise StateError(
            "experts are steered and values intervened in, and bake writes one of both: take one "
            "away, with steer --clear or intervene --clear"
        )
    for placed in steering.interventions:
        if placed.change.kind not in ("add_vector", "steer_feature") or placed.change.heads:
            raise PlanError(
                f"{placed.described} cannot be baked: it follows the value, and only a vector that "
                "is added to every token alike is a constant, which a bias can hold"
            )


def _line(placed: Placed) -> str:
    """The command that puts a vector in force again. Raises StateError for one of no file."""
    change, source = placed.change, placed.source
    if change.kind == "steer_feature" and source:
        words = ["sae", "use", source, "--feature", f"{change.numbers[0]:.0f}",
                 "--strength", repr(change.numbers[1]), "--at", placed.name]  # fmt: skip
        return shlex.join(words)
    parts = placed.name.split(".")
    if change.kind == "add_vector" and source.endswith(".safetensors") and parts[0] == "layers":
        words = [
            "vector",
            "use",
            source,
            "--layer",
            parts[1],
            "--strength",
            repr(change.numbers[0]),
        ]
        return shlex.join(words)
    if change.kind == "add_vector" and source:
        raise StateError(
            f"the vectors {source} are in hand only, and the history of the baked model has to name a "
            f"file: vector save {source} {source}.safetensors, vector use {source}.safetensors, bake"
        )
    return f"# {placed.described}"


@dataclass(frozen=True, slots=True)
class _Move:
    """What is added to a bias. path: of its module. layer: decoder layer, None outside of all."""

    path: str
    layer: int | None
    vector: mx.array


class _Baker:
    """Finds a bias for each vector, on the live model without steering, and makes the delta."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._parts = Parts(
            workspace.model, workspace.map, workspace.tokenizer, workspace.resident.layers
        )
        self._moves: list[_Move] = []
        self.held: list[Held] = []

    def take(self, placed: Placed) -> None:
        """Find a bias for one intervention at each of its values. Raises PlanError for none."""
        change = placed.change
        assert change.array is not None
        strength = change.numbers[-1]
        vector = change.array.astype(mx.float32) * strength
        for point in self._parts.names.several(placed.name):
            tried = []
            for path in self._biased(point):
                move = _Move(path, point.layer, vector)
                if vector.shape == self._bias(path).shape and self._agrees(point, change, move):
                    self._moves.append(move)
                    norm = float(np.linalg.norm(np.array(vector)))
                    self.held.append((point.name, change.described, f"{path}.bias", norm))
                    break
                tried.append(path)
            else:
                raise PlanError(f"{change.described} cannot be baked: {self._why(point, tried)}")

    def _biased(self, point: Point) -> list[str]:
        return [path for path in self._writers(point) if self._bias(path).size]

    def _bias(self, path: str) -> mx.array:
        bias = self._workspace.resident.tree.modules[path].get("bias")
        return bias if isinstance(bias, mx.array) else mx.array([])

    def _writers(self, point: Point) -> Iterator[str]:
        """Modules whose bias may be a part of the value: itself, or what writes there."""
        modules = self._workspace.resident.tree.modules
        if point.kind == "output" and point.columns is None and point.path in modules:
            yield point.path
        tail = point.name.removeprefix(f"layers.{point.layer}.")
        if point.kind != "output" or tail not in COMPONENTS:
            return
        try:
            outputs = residual_outputs(modules, self._workspace.map)
        except ModelError:
            return  # a family whose writers are not known: nothing can be said to be exact
        for component in COMPONENTS[tail]:
            for output in outputs:
                if (
                    output.layer == point.layer
                    and output.component == component
                    and not output.rows
                ):
                    yield output.path  # whether it comes there unchanged is tried out

    def _why(self, point: Point, tried: list[str]) -> str:
        if tried:
            return (
                f"{', '.join(f'{path}.bias' for path in tried)} does not come to {point.name} "
                "unchanged (it is scaled, gated or normalised on the way, other parts see it too, or it "
                "is too small to be told from rounding)"
            )
        writers = list(dict.fromkeys(self._writers(point)))
        named = f" ({', '.join(writers)})" if writers else ""
        return (
            f"nothing that writes {point.name} for every token{named} has a bias, and a weight holds "
            "no constant, since what it puts out follows its input; keep it as it stands"
        )

    # -- new biases -------------------------------------------------------------------------------

    def delta(self) -> Delta:
        """The new biases of all vectors; several at one bias are summed."""
        return self._delta(self._moves)

    def _delta(self, moves: list[_Move]) -> Delta:
        resident, stored = self._workspace.resident, self._workspace.stored
        by_layer: dict[int | None, dict[str, mx.array]] = {}
        for move in moves:
            vectors = by_layer.setdefault(move.layer, {})
            vectors[move.path] = vectors.get(move.path, mx.array(0.0)) + move.vector
        layers = []
        for index, vectors in by_layer.items():
            arrays: dict[str, mx.array] = {}
            rows: dict[str, Rows | None] = {}
            for module, vector in vectors.items():
                path = f"{module}.bias"
                with resident.module(module):
                    own = self._bias(module)
                    new = rounded(own.astype(mx.float32) + vector, stored(path), own.dtype)
                    mx.eval(new)
                arrays[path], rows[path] = new, Rows.of([whole_digest(new, stored(path))])
            layers.append(self._layer(index, arrays, rows))
        return Delta(tuple(layers))

    def _layer(
        self, index: int | None, arrays: dict[str, mx.array], rows: dict[str, Rows | None]
    ) -> LayerDelta:
        resident, made = self._workspace.resident, frozenset(arrays)
        moe = None if index is None else self._workspace.map.layers[index].moe
        if moe is None:
            return LayerDelta(None, arrays=arrays, rows=rows, made=made)
        live = resident.layers[moe.position].live
        return LayerDelta(
            moe.position, live, resident.stack[moe.position], arrays=arrays, rows=rows, made=made
        )

    # -- whether it is exact ----------------------------------------------------------------------

    def _agrees(self, point: Point, change: Intervention, move: _Move) -> bool:
        """Whether the value with the new bias is that with the intervention, up to what rounding of
        the bias to its stored dtype and of the stream's values leaves; and not without either."""
        plain = self._value(point, None)
        wanted = self._value(point, change)
        with self._workspace.trial(self._delta([move])):
            found = self._value(point, None)
        stored = self._workspace.stored(f"{move.path}.bias")
        with self._workspace.resident.module(move.path):
            largest = np.abs(on_host(self._bias(move.path))).max()
        size = float(np.abs(on_host(move.vector)).max() + largest)
        limit = 4 * mx.finfo(stored).eps * size + self._grain(point) * np.abs(wanted)
        near, moved = np.abs(found - wanted) <= limit, np.abs(plain - wanted) > 4 * limit
        return bool(near.all() and moved.any())

    def _grain(self, point: Point) -> float:
        one = Saved(point)
        run_once(self._parts, padded([[0, 0]]), [], [one], evaluate=False)
        return 16 * float(mx.finfo(one.dtype).eps)

    def _value(self, point: Point, change: Intervention | None) -> np.ndarray:
        most = min(self._workspace.map.vocabulary or 256, 256)
        tokens = np.random.default_rng(0).integers(0, most, PROBE).tolist()
        one = Saved(point)
        run_once(self._parts, padded([tokens]), [] if change is None else [(point, change)], [one])
        return on_host(one.value)
