"""Forwards over many batches, each watched by its client.

A model in memory runs one batch after the other. One that is read layer by layer carries all
batches through each layer in turn (mlxfun.hooks.replay), so that a pass reads it once, and adds up
to the same, bit for bit: every batch passes the same operations, and results come in the order of
the batches. Where layers cannot be replayed, it is read once for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.errors import BudgetError
from mlxfun.events import Notice
from mlxfun.hooks.elsewhere import Task, elsewhere_of
from mlxfun.hooks.progress import Progress, Seen, identity_of
from mlxfun.hooks.replay import NotReplayable, Replay, all_layers, longest, tell_reading
from mlxfun.hooks.routing import Reduction, Taps
from mlxfun.model.anatomy.types import MoEMap
from mlxfun.model.device.batch_size import each_batch
from mlxfun.model.device.hints import announce
from mlxfun.model.device.memory import is_out_of_memory
from mlxfun.model.places import LayerStore

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

Result = TypeVar("Result")
READING = Task("reading layers")

NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Watch(Generic[Result]):
    """How the forward of one batch is watched.

    run: runs the model on the batch and returns what was seen, evaluated. attached: hooks that see
    its decoder layers run. Where batches are carried, the layers run ahead of `run`, inside
    `attached`, and answer with what they made when `run` calls the model. seen: what those hooks
    have seen so far; a pass that goes on after its process was killed puts it back. passed: called
    when all batches have passed a layer.
    """

    run: Callable[[], Result]
    attached: Callable[[], AbstractContextManager[object]] = nullcontext
    seen: Seen = field(default_factory=dict)
    passed: Callable[[], None] = lambda: None


def each_forward(
    model: nn.Module,
    anatomy: MoEMap,
    todo: Sequence[Batch],
    watch: Callable[[Batch], Watch[Result]],
    ctx: Context = SILENT,
    task: Task = READING,
) -> Iterator[tuple[Batch, Result]]:
    """Each batch with what its watch returns, in order. Checks for a cancel before each forward.

    task: what the pass is called and, if it may run in other processes, the same as plain data.
    With the label "" no progress through the layers of a model on disk is told, and what a process
    leaves that was killed is not taken up by the next.

    Raises BudgetError where memory does not suffice.
    """
    elsewhere = elsewhere_of(model)
    if task.name and elsewhere is not None:
        found: Any = elsewhere.forwards(task, todo, ctx)
        if found is not None:
            yield from found
            return
    if LayerStore.of(model) is not None and todo:
        if task.label:
            tell_reading(model, ctx)
        replay = _replay(model, all_layers(model, anatomy), [batch.tokens for batch in todo], ctx)
        if replay.obstacle is None:
            watches = [watch(batch) for batch in todo]
            largest = max(batch.tokens.size for batch in todo)
            progress = _progress(replay, todo, task.label)
            try:
                with _explained(largest):
                    results = _carried(replay, watches, ctx, task.label, progress)
                    yield from zip(todo, results, strict=True)
                if progress is not None:
                    progress.done()
                return
            except NotReplayable as reason:
                replay.obstacle = str(reason)
            finally:
                replay.end()
        store = LayerStore.of(model)
        if len(todo) > 1 and store is not None:
            ctx.emit(Notice("warning", _once_a_batch(replay.obstacle, len(todo), store)))
        del replay
    yield from each_batch(todo, lambda batch: _watched(watch(batch)), ctx)


Lane = tuple[Callable[[], AbstractContextManager[None]], Sequence["Batch"]]
"""What makes one state of the weights live, and the batches that it runs."""


def carried_together(
    model: nn.Module, anatomy: MoEMap, lanes: Sequence[Lane], ctx: Context, label: str
) -> list[Replay]:
    """The batches of several states of a model on disk, behind all layers, in one reading.

    What the states share of a layer is read once. For `arrived`. Raises NotReplayable.
    """
    store, run, layers = LayerStore.of(model), cast(Any, model), all_layers(model, anatomy)
    assert store is not None
    announce(ctx)
    tell_reading(model, ctx)
    replays: list[Replay] = []
    probe = longest([batch.tokens for _, batches in lanes for batch in batches])
    for live, batches in lanes:
        forwards = [partial(run, mx.array(batch.tokens)) for batch in batches]
        with live():
            along = not replays
            replays.append(Replay(model, layers, forwards, probe if along else NONE, ctx, along))
    try:
        for number in range(len(layers)):
            with store.layer(number):
                for (live, _), replay in zip(lanes, replays, strict=True):
                    with live():
                        replay.pass_probe()
                        replay.arrive(number + 1, ctx)
                mx.synchronize()
            ctx.progress(label, number + 1, len(layers), "layers")
        replays[0].verify()
    finally:
        replays[0].end()
    return replays


def arrived(
    replay: Replay,
    todo: Sequence[Batch],
    work: Callable[[Batch], Result],
    ctx: Context = SILENT,
) -> Iterator[tuple[Batch, Result]]:
    """`work` on each batch of a replay that is behind all layers; the model need not be read."""
    for batch, travel in zip(todo, replay.travels, strict=True):
        ctx.check()
        with replay.behind(travel):
            result = work(batch)
        yield batch, result


def _replay(
    model: nn.Module, layers: Sequence[nn.Module], tokens: Sequence[Array], ctx: Context
) -> Replay:
    run: Any = model
    announce(ctx)
    forwards = [partial(run, mx.array(one)) for one in tokens]
    return Replay(model, layers, forwards, longest(tokens), ctx, along=True)


def one_step(
    model: nn.Module, steps: Sequence[tuple[mx.array, Any]], ctx: Context = SILENT
) -> list[mx.array]:
    """One forward of each of several batches that have caches: logits [B, T, V] each, lazy.

    steps: (tokens int [B, T], the caches of the batch). A model on disk is read once for all.
    """
    run: Any = model
    calls = [partial(run, tokens, cache=cache) for tokens, cache in steps]
    store = LayerStore.of(model)
    if store is not None:
        modules = dict(model.named_modules())
        layers = [modules[path] for path in store.numbers]
        replay = Replay(model, layers, calls, np.array(steps[0][0][0]), ctx)
        if replay.obstacle is None:
            return list(_carried(replay, [Watch(call) for call in calls], ctx))
    return [call() for call in calls]


def _once_a_batch(why: str, batches: int, store: LayerStore) -> str:
    return (
        f"the model is read from disk {batches} times, once for each batch, since {why}: "
        f"{store.cost(batches)}; larger batches (--batch-tokens) need fewer"
    )


def reduced(
    model: Callable[[mx.array], object], taps: Taps, batch: Batch, reduction: Reduction
) -> Watch[Array]:
    """The reduced arrays of one batch's forward, stacked on the host, [L, ...]."""

    def run() -> Array:
        model(mx.array(batch.tokens))
        stacked = mx.stack(reduction.drain())
        mx.eval(stacked)
        return np.array(stacked)

    return Watch(run, lambda: taps.telling(reduction), reduction.seen)


def _watched(watch: Watch[Result]) -> Result:
    with watch.attached():
        return watch.run()


def _progress(replay: Replay, todo: Sequence[Batch], label: str) -> Progress | None:
    store = replay.store
    if store is None or store.passes is None or not label:
        return None
    return Progress(store.passes, identity_of(store.identity(), label, todo))


def _go_on(
    replay: Replay, watches: Sequence[Watch[Result]], progress: Progress, ctx: Context
) -> None:
    """Take up the pass where an earlier one like it was broken off."""
    layer = progress.read(replay.states, [one.seen for one in watches])
    if not 0 < layer < len(replay.layers):
        return
    replay.test_ahead()
    replay.next = layer
    ctx.emit(
        Notice("info", f"going on at layer {layer}, where a pass like this one was broken off")
    )


def _carried(
    replay: Replay,
    watches: Sequence[Watch[Result]],
    ctx: Context,
    label: str = "",
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What each watch returns, once all batches have passed all layers.

    Raises NotReplayable, before the first is returned, where a probe came out otherwise.
    """
    if progress is not None:
        _go_on(replay, watches, progress, ctx)
    for number in range(replay.next, len(replay.layers)):
        with replay.reading(number):
            for travel, one in zip(replay.travels, watches, strict=True):
                ctx.check()
                with one.attached():
                    replay.advance(travel)
            replay.pass_probe()
            # What was queued of the layer must not keep it in memory.
            mx.synchronize()
            replay.next += 1
        if progress is not None and progress.due():
            progress.write(number + 1, replay.states, [one.seen for one in watches])
        for one in watches:
            one.passed()
        if label:
            ctx.progress(label, number + 1, len(replay.layers), "layers")
    replay.verify()
    for travel, one in zip(replay.travels, watches, strict=True):
        ctx.check()
        with one.attached(), replay.behind(travel):
            result = one.run()
        yield result


@contextmanager
def _explained(largest: int) -> Iterator[None]:
    """A failure for want of memory says what to do. largest: tokens of the largest batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"one decoder layer and batches of {largest:,} tokens do not fit in memory "
            f"({str(error)[:100]}); lower --batch-tokens or --max-tokens"
        ) from error
