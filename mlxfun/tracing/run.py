"""Forwards in which values are saved and changed: from points to hooks, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.errors import HookError, UsageError
from mlxfun.hooks.attention import AttentionPart, AttentionTaps, Visit
from mlxfun.hooks.expert_probe import ExpertProbe, RoutePart, VisitRoute
from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.layers import module_name
from mlxfun.tracing.axes import Axes, Span, axes_of, laid_out, put_back
from mlxfun.tracing.interventions import Edit, EditOfExperts, Intervention, forced_choice, zero_out
from mlxfun.tracing.names import Point
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.prompts import Batch
from mlxfun.tracing.values import RouteSaved, Saved


@dataclass(slots=True)
class _Route:
    """The route of one layer in the forward in progress."""

    logits: mx.array | None = None
    choice: mx.array | None = None
    weights: mx.array | None = None


@dataclass(slots=True)
class _Wanted:
    """What is asked of one point."""

    point: Point
    edits: list[Edit] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    reached: bool = False


class Run:
    """Hooks for a set of saved values and edits, in force inside its `with` block.

    Values are saved as they leave a point, after its edits, whatever the order of asking. Nothing
    is evaluated here. batch: the prompts. prompt: length of the prompt of a generation, whose
    positions count on from forward to forward. With neither it may be in force in any forward: then
    it saves nothing, and its edits have no positions.
    """

    def __init__(
        self,
        parts: Parts,
        edits: Sequence[tuple[Point, Edit]],
        saved: Sequence[Saved],
        batch: Batch | None = None,
        prompt: int | None = None,
    ) -> None:
        self._parts, self._batch, self._prompt = parts, batch, prompt
        self._any = batch is None and prompt is None
        self._wanted: dict[str, _Wanted] = {}
        for point, change in edits:
            _require_possible(parts, point, change)
            self._of(point).edits.append(change)
        for one in saved:
            self._of(one.point).saved.append(one)
        self._routes: dict[int, _Route] = defaultdict(_Route)
        self._span = Span(0, 0, np.zeros(0, int), np.zeros(0, int))
        self._offset = 0
        self._hooks = Hooks(parts.modules)
        self._hook_routes()  # inside: a block's output is seen as its experts' edits leave it
        self._hook_modules()
        self._attention = self._attention_taps()

    def _of(self, point: Point) -> _Wanted:
        return self._wanted.setdefault(point.name, _Wanted(point))

    # -- hooks ----------------------------------------------------------------------------------

    def _hook_modules(self) -> None:
        places: dict[str, list[_Wanted]] = defaultdict(list)
        for one in self._wanted.values():
            if one.point.kind in ("input", "output"):
                places[one.point.path].append(one)
        if not self._any or "output" in self._wanted:
            self._hooks.on_call("", self._whole, required=False)
        for path, wanted in places.items():
            self._hooks.on_call(path, self._module(wanted), required=False)

    def _module(self, wanted: list[_Wanted]) -> Callable[..., Any]:
        before = [one for one in wanted if one.point.kind == "input"]
        after = [one for one in wanted if one.point.kind == "output"]

        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            for one in before:
                args, kwargs = self._first(one, args, kwargs)
            out = own(*args, **kwargs)
            for one in after:
                out = self._main(one, out)
            return out

        return call

    def _whole(self, own: Any, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward: what it is run on is known before any part is reached."""
        if self._any:
            return self._main(self._wanted["output"], own(tokens, *args, **kwargs))
        rows, width = tokens.shape
        batch = self._batch
        first = batch.first if batch is not None else np.zeros(rows, int)
        past = batch.past if batch is not None else np.full(rows, width)
        self._span = Span(rows, width, first, past, self._offset, self._prompt)
        out = own(tokens, *args, **kwargs)
        if "output" in self._wanted:
            out = self._main(self._wanted["output"], out)
        self._offset += width
        self._routes.clear()
        return out

    def _first(self, one: _Wanted, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Let the first array among the arguments pass."""
        for place, value in enumerate(args):
            if isinstance(value, mx.array):
                new = self._pass(one, value)
                return (*args[:place], new, *args[place + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, mx.array):
                return args, {**kwargs, name: self._pass(one, value)}
        raise HookError(f"{one.point.described} takes no array")

    def _main(self, one: _Wanted, out: Any) -> Any:
        """Let an output pass; of several, the first array. A part that puts out nothing this time
        (deepseek_v32's indexer on short texts) is not reached."""
        if out is None:
            return out
        if isinstance(out, mx.array):
            return self._pass(one, out)
        if isinstance(out, tuple | list):
            for place, value in enumerate(out):
                if isinstance(value, mx.array):
                    new = self._pass(one, value)
                    return type(out)((*out[:place], new, *out[place + 1 :]))
        raise HookError(f"{one.point.described} puts out a {type(out).__name__}, and no array")

    def _hook_routes(self) -> None:
        parts: dict[int, set[RoutePart]] = defaultdict(set)
        for one in self._wanted.values():
            point = one.point
            if point.route is None or point.layer is None:
                continue
            parts[point.layer].add(point.route)
            if point.kind == "expert":
                parts[point.layer].add("weights")
            if point.route == "choice" and one.edits:
                parts[point.layer].add("logits")
        for layer, wanted in parts.items():
            probe = ExpertProbe(self._parts.experts(layer), self._route(layer), wanted)
            probe.hook(self._hooks)

    def _attention_taps(self) -> AttentionTaps:
        visits: dict[str, Visit] = {}
        wanted: dict[str, set[AttentionPart]] = defaultdict(set)
        edited: set[str] = set()
        for one in self._wanted.values():
            point = one.point
            if point.attention is None or self._heads_by_hand(one):
                continue
            visits[point.path] = self._attention_visit(point.path)
            wanted[point.path].add(point.attention)
            if point.attention == "weights" and one.edits:
                edited.add(point.path)
        return AttentionTaps(self._parts.modules, visits, wanted, edited)

    def _heads_by_hand(self, one: _Wanted) -> bool:
        """Hook the heads of an attention that multiplies by hand: what its output projection takes,
        [B, T, H * Dh]. Whether it is one."""
        point, modules = one.point, self._parts.modules
        family = module_name(modules[point.path])
        if point.attention != "heads" or family not in facts.SOFTMAX_ATTENTION:
            return False
        attributes = vars(modules[point.path])
        count = next(attributes[name] for name in facts.HEAD_COUNTS if name in attributes)

        def call(own: Any, x: mx.array) -> Any:
            heads = x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)
            new = self._pass(one, heads)
            return own(x if new is heads else new.swapaxes(1, 2).reshape(x.shape))

        output = self._parts.map.path(f"{point.name.removesuffix('.heads')}.output")
        self._hooks.on_call(output, call, required=False)
        return True

    def _attention_visit(self, path: str) -> Visit:
        named = {
            one.point.attention: one
            for one in self._wanted.values()
            if one.point.attention is not None and one.point.path == path
        }
        return lambda part, value: self._pass(named[part], value)

    # -- passing --------------------------------------------------------------------------------

    def _streams(self, point: Point) -> int | None:
        if point.layer is None or point.path != self._parts.layer(point.layer).path:
            return None
        return facts.STREAMS.get(module_name(self._parts.modules[point.path]))

    def _pass(self, one: _Wanted, value: mx.array) -> mx.array:
        """Change and save one value on its way."""
        one.reached = True
        if one.point.columns is not None:
            return self._pass_columns(one, value, mx.array(one.point.columns, mx.int32))
        if self._any:
            return self._passed_anywhere(one, value)
        streams = self._streams(one.point)
        laid = new = laid_out(one.point, value, self._span, streams)
        axes = axes_of(one.point, laid, self._span, streams)
        for change in one.edits:
            new = change(new, axes, self._span)
        for saved in one.saved:
            saved.take(new, axes, self._span)
        return value if new is laid else put_back(one.point, new, value)

    def _pass_columns(self, one: _Wanted, value: mx.array, columns: mx.array) -> mx.array:
        """Let a part of a fused projection's output pass."""
        part = mx.take(value, columns, axis=-1)
        whole = replace(one, point=replace(one.point, columns=None))
        new = self._pass(whole, part)
        if new is part:
            return value
        changed = value[...]  # a name of its own: the model's array is not written into
        changed[..., columns] = new
        return changed

    def _passed_anywhere(self, one: _Wanted, value: mx.array) -> mx.array:
        axes = Axes(0, 2, 1) if one.point.kind == "attention" else Axes(0, 1)
        for change in one.edits:
            value = change(value, axes, self._span)
        return value

    def _route(self, layer: int) -> VisitRoute:
        name = f"layers.{layer}.router"

        def visit(part: RoutePart, value: mx.array) -> mx.array:
            route, span = self._routes[layer], self._span
            if part == "contribution":
                return self._experts(layer, value)
            laid = value if self._any else value.reshape(span.rows, span.width, -1)
            one = self._wanted.get(f"{name}.{part}")
            new = laid
            if one is not None:
                one.reached = True
                new = self._changed_route(one, laid, route, layer)
                for saved in one.saved:
                    saved.take(new, Axes(0, 1), span)
            if part == "logits":
                route.logits = new
            elif part == "choice":
                route.choice = new
            else:
                route.weights = new
            return value if new is laid else new.reshape(value.shape)

        return visit

    def _changed_route(self, one: _Wanted, laid: mx.array, route: _Route, layer: int) -> mx.array:
        new = laid
        for change in one.edits:
            if isinstance(change, Intervention) and change.kind == "force_route":
                assert route.logits is not None
                columns = self._columns(layer, laid)
                logits = route.logits.reshape(*laid.shape[:-1], -1)
                new = forced_choice(change, new, logits, columns, self._span)
            else:
                new = change(new, Axes(0, 1), self._span)
        return new

    def _columns(self, layer: int, choice: mx.array) -> mx.array:
        """Where the logits of chosen experts are: a pruned layer has one for each live expert."""
        live = self._parts.experts(layer)
        if live.labels is None:
            return choice
        table = np.zeros(max(live.live) + 1, np.uint32)
        table[list(live.live)] = np.arange(len(live.live))
        return mx.array(table)[choice]

    def _experts(self, layer: int, value: mx.array) -> mx.array:
        """What the experts of a layer add, [..., K, D]."""
        span, route = self._span, self._routes[layer]
        assert route.choice is not None
        leading = value.shape[:-2] if self._any else (span.rows, span.width)
        laid = new = value.reshape(*leading, *value.shape[-2:])
        prefix = f"layers.{layer}.experts."
        wanted = [one for name, one in self._wanted.items() if name.startswith(prefix)]
        wanted = [one for one in wanted if one.point.kind == "expert"]
        for one in wanted:
            one.reached = True
            for change in one.edits:
                new = self._changed_experts(one.point, change, new, route.choice)
        for one in wanted:
            for saved in one.saved:
                assert isinstance(saved, RouteSaved)
                assert route.weights is not None
                saved.take_route(new, route.choice, route.weights, span)
        return value if new is laid else new.reshape(value.shape)

    def _changed_experts(
        self, point: Point, change: Edit, value: mx.array, choice: mx.array
    ) -> mx.array:
        if point.expert is None:  # of all experts of the layer at once
            assert isinstance(change, EditOfExperts)
            return change.on_experts(value, choice)
        hit = (choice == point.expert)[..., None]
        return mx.where(hit, change(value, Axes(0, 1), self._span), value)

    # -- in force -------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._offset = 0
        self._hooks.attach()
        self._attention.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._attention.__exit__(None, None, None)
        self._hooks.detach()

    def require_reached(self) -> None:
        """Raise HookError for what no forward came by: it was not saved, and nothing was changed."""
        missed = [one.point.described for one in self._wanted.values() if not one.reached]
        if missed:
            raise HookError(
                f"the forward of {self._parts.map.model_type} did not reach {', '.join(missed[:5])}"
                f"{f' and {len(missed) - 5} more' if len(missed) > 5 else ''}: this architecture "
                "computes it in another way, or not on this input; `names` lists what there is"
            )


def _require_possible(parts: Parts, point: Point, change: Edit) -> None:
    """Raise UsageError for an edit that could have no effect, or not the one that is meant."""
    if not isinstance(change, Intervention):
        change = zero_out()
    if change.kind == "force_route" and point.route != "choice":
        raise UsageError(f"{change.described} belongs at layers.i.router, not at {point.name}")
    if change.kind in ("drop_expert", "scale_expert") and point.kind != "expert":
        raise UsageError(f"{change.described} belongs at layers.i.experts, not at {point.name}")
    if point.layer is None or point.route is None:
        return
    moe = parts.experts(point.layer).layer
    if point.route == "weights" and moe.facts.weights_inside:
        raise UsageError(
            f"{moe.family} multiplies its experts' input by the weight, so {point.name} cannot be "
            "changed by itself; change router.logits or an expert's output"
        )
    if change.kind == "force_route" and moe.router_rows > moe.num_experts:
        raise UsageError(
            f"{change.described}: the router of {moe.family} also chooses among "
            f"{moe.router_rows - moe.num_experts} experts that are no weights, and a place given to "
            "one has no weight to take over; change router.logits instead"
        )
    if change.kind == "force_route":
        forced, most = (
            len(set(change.experts)),
            min(moe.top_k, len(parts.experts(point.layer).live)),
        )
        if not 0 < forced <= most:
            raise UsageError(f"{change.described}: a token has {most} experts; force 1 to {most}")
        live = parts.experts(point.layer).live
        gone = [expert for expert in change.experts if expert not in live]
        if gone:
            raise UsageError(
                f"{change.described}: layer {point.layer} has no live expert "
                f"{', '.join(map(str, gone))}"
            )
