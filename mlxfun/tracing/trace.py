"""A trace: what is saved and changed is asked for inside the `with` block, and done at its end.

    with model.trace("The capital of France is") as t:
        attention = model.layers[3].attn.output.save()
        model.layers[4].mlp.output = 0.0
    attention.value

One forward runs when the block ends. Only what was saved is evaluated, and of the forward only what
that needs: MLX is lazy, so a trace of layer 0 stops there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import mlx.core as mx

from mlxfun.errors import StateError, UsageError
from mlxfun.tracing.axes import Positions
from mlxfun.tracing.generate import Generated, Sampling, generate
from mlxfun.tracing.interventions import Edit, Intervention, intervention
from mlxfun.tracing.names import Point
from mlxfun.tracing.node import Node
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.prompts import Batch, left_padded_cache
from mlxfun.tracing.run import Run
from mlxfun.tracing.values import Saved, SavedExpert


class Recorder:
    """What is asked for, by name."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.saved: list[Saved] = []
        self.edits: list[tuple[Point, Intervention]] = []
        self.done = False

    def save(
        self, name: str, positions: Positions | None = None, heads: Sequence[int] | None = None
    ) -> Any:
        """Save the values of a name, a list where it is of several layers."""
        self._open(f"save {name}")
        points = self._parts.names.several(name)
        made = [_saved(point, positions, heads) for point in points]
        self.saved += made
        return made[0] if len(made) == 1 and points[0].name == _one(name, points) else made

    def edit(self, name: str, change: Any) -> None:
        """Change the values of a name."""
        self._open(f"change {name}")
        made = intervention(change)
        for place, what in expanded(name, made):
            self.edits += [(point, what) for point in self._parts.names.several(place)]

    def _open(self, action: str) -> None:
        if self.done:
            raise StateError(f"the trace is over: {action} inside the `with` block")


def _one(name: str, points: Sequence[Point]) -> str:
    """The name of the point, if the name is that of a single one."""
    which = name.split(".")[1:2]
    single = not which or which[0].lstrip("-").isdigit() or not name.startswith("layers.")
    return points[0].name if single else ""


def _saved(point: Point, positions: Positions | None, heads: Sequence[int] | None) -> Saved:
    if point.kind != "expert":
        return Saved(point, positions, heads)
    if heads is not None:
        raise UsageError(f"{point.name} has no heads")
    return SavedExpert(point, positions)


def expanded(name: str, change: Intervention) -> list[tuple[str, Intervention]]:
    """Where an intervention acts: those of experts and routes are given at the layer's part."""
    if change.kind == "compose":
        return [pair for part in change.parts for pair in expanded(name, part)]
    base = name.removesuffix(".output")
    if change.kind in ("drop_expert", "scale_expert") and base.endswith(".experts"):
        return [(f"{base}.{expert}.output", change) for expert in change.experts]
    if change.kind == "force_route" and name.endswith(".router"):
        return [(f"{name}.choice", change)]
    return [(name, change)]


OWN = ("saved", "edits", "done", "batch", "tokens", "generated")
"""Attributes of a trace that are no names of the model."""


class Trace(Recorder):
    """One traced forward. Names are attributes of it, as they are of the model.

    Made by `Model.trace` and `Session.trace`. tokens: those of each prompt. generated: the answer,
    where one was asked for.
    """

    def __init__(
        self, parts: Parts, batch: Batch, dry_run: bool = False, sampling: Sampling | None = None
    ) -> None:
        super().__init__(parts)
        if sampling is not None and (dry_run or len(batch.tokens) != 1):
            raise UsageError("an answer is generated to one prompt, and not in a dry run")
        self.batch, self._dry, self._sampling = batch, dry_run, sampling
        self.tokens = batch.rows
        self.generated: Generated | None = None

    @property
    def names(self) -> Node:
        """The beginning of every name."""
        return Node(self._parts.names, self, "")

    def __getattr__(self, attribute: str) -> Node:
        if attribute.startswith("_") or "_parts" not in self.__dict__:
            raise AttributeError(attribute)
        node: Node = getattr(self.names, attribute)
        return node

    def __getitem__(self, name: str) -> Node:
        self._parts.names.several(name)
        return Node(self._parts.names, self, name)

    def __setitem__(self, name: str, change: Any) -> None:
        self.edit(name, change)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute.startswith("_") or attribute in OWN:
            super().__setattr__(attribute, value)
        else:
            setattr(self.names, attribute, value)

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.done = True
        if kind is not None:
            return
        if self._sampling is None:
            run_once(self._parts, self.batch, self.edits, self.saved, evaluate=not self._dry)
        else:
            asked = self.edits, self.saved
            self.generated = generate(self._parts, self.tokens[0], *asked, self._sampling)


def run_once(
    parts: Parts,
    batch: Batch,
    edits: Sequence[tuple[Point, Edit]],
    saved: Sequence[Saved],
    *,
    evaluate: bool = True,
) -> Any:
    """One forward over a batch; the saved values are evaluated, nothing else is.

    Returns the model's output, lazy. Raises HookError where an asked value was not reached.
    """
    left = bool((batch.first > 0).any())
    cache = left_padded_cache(parts.model, batch) if left else None
    with Run(parts, edits, saved, batch) as run:
        out = parts.forward(mx.array(batch.tokens), cache)
    run.require_reached()
    if evaluate:
        mx.eval([one.arrays() for one in saved])
    for one in saved:
        one.finish(evaluate)
    return out
