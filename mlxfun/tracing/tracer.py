"""The tracer of a resident model: traces, names, and what is built on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.errors import StateError
from mlxfun.tracing.axes import Positions
from mlxfun.tracing.generate import Generated, Sampling, generate
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.names import Point
from mlxfun.tracing.node import Node
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.prompts import Batch, Padding, Prompts, encode, padded
from mlxfun.tracing.run import Run
from mlxfun.tracing.trace import Recorder, Trace
from mlxfun.tracing.values import Saved, SavedExpert, Shape


class Tracer:
    """Traces one resident model. Not for several threads: see mlxfun.session.worker."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._traces: list[Trace] = []

    # -- names ------------------------------------------------------------------------------------

    def names(self) -> Mapping[str, str]:
        """{canonical name: path of the module} of everything that can be saved or changed.

        Of the experts of a layer only the first is listed.
        """
        return {name: point.path for name, point in self.parts.names.points.items()}

    def save(
        self, name: str, positions: Positions | None = None, heads: Sequence[int] | None = None
    ) -> Any:
        """Save a value by its name in the trace that is open."""
        return self._open().save(name, positions, heads)

    def edit(self, name: str, change: Any) -> None:
        """Change a value by its name in the trace that is open."""
        self._open().edit(name, change)

    def _open(self) -> Trace:
        self._traces = [trace for trace in self._traces if not trace.done]
        if not self._traces:
            raise StateError("no trace is open: save and change inside `with model.trace(...)`")
        return self._traces[-1]

    def node(self, attribute: str) -> Node:
        """The beginning of the names under `attribute`."""
        node: Node = getattr(Node(self.parts.names, self, ""), attribute)
        return node

    @property
    def layers(self) -> Node:
        """The decoder layers: `model.layers[3].attn.output`."""
        return self.node("layers")

    def __getitem__(self, name: str) -> Node:
        self.parts.names.several(name)
        return Node(self.parts.names, self, name)

    def __setitem__(self, name: str, change: Any) -> None:
        self.edit(name, change)

    # -- traces -----------------------------------------------------------------------------------

    def batch(self, prompts: Prompts | Batch, padding: Padding = "right") -> Batch:
        """Texts or token ids as a padded batch; a Batch as it is."""
        if isinstance(prompts, Batch):
            return prompts
        return padded(encode(self.parts.tokenizer, prompts, self.parts.map.vocabulary), padding)

    def trace(
        self,
        prompts: Prompts | Batch,
        *,
        padding: Padding = "right",
        dry_run: bool = False,
        max_tokens: int | None = None,
    ) -> Trace:
        """A forward over `prompts` in which values are saved and changed; see mlxfun.tracing.trace.

        prompts: a text, token ids, or several of either. padding: side on which shorter prompts of
        a batch are padded. dry_run: nothing is evaluated, saved values have shape and dtype only.
        max_tokens: generate an answer of at most so many tokens, edits and all; see `generated`.
        """
        sampling = None if max_tokens is None else Sampling(max_tokens)
        made = Trace(self.parts, self.batch(prompts, padding), dry_run, sampling)
        self._traces.append(made)
        return made

    def generate(
        self,
        prompt: Prompts,
        max_tokens: int = 64,
        interventions: Mapping[str, Any] | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        ctx: Context = SILENT,
    ) -> Generated:
        """An answer to one prompt. interventions: {name: change}, in force in every forward of it."""
        asked = Recorder(self.parts)
        for name, change in (interventions or {}).items():
            asked.edit(name, change)
        (row,) = self.batch(prompt).rows
        sampling = Sampling(max_tokens, temperature, seed=seed)
        return generate(self.parts, row, asked.edits, [], sampling, ctx)

    def dry_run(self, prompts: Prompts | Batch) -> Mapping[str, Shape]:
        """{name: shape and dtype} of every value that a forward over `prompts` reaches, without
        evaluating anything (dbrx's forward evaluates by itself)."""
        saved = [_saved(point) for point in self.parts.names.points.values()]
        batch = self.batch(prompts)
        edits: list[tuple[Point, Intervention]] = []
        with Run(self.parts, edits, saved, batch):
            self.parts.forward(mx.array(batch.tokens))
        reached = [one for one in saved if one.reached]
        for one in reached:
            one.finish(evaluated=False)
        return {one.name: one.described for one in reached}


def _saved(point: Point) -> Saved:
    return SavedExpert(point) if point.kind == "expert" else Saved(point)
