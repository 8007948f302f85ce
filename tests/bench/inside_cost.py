"""What looking inside costs: against plain forwards of the same model, and in memory.

Used by at_scale.py (`--only inside`) and by test_inside_cost.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx

from mlxfun import Session
from mlxfun.tracing.lenses.logit_lens import Lens, logit_lens
from mlxfun.tracing.patching.activation import activation_patching
from mlxfun.tracing.patching.study import Patching

Row = tuple[str, float, float]
"""(what, figure, peak bytes above the model)"""


def timed(work: Callable[[], Any]) -> float:
    mx.synchronize()
    began = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - began


def peak_above(work: Callable[[], Any]) -> float:
    mx.synchronize()
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - base


def ratio(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> float:
    """The median over pairs of what `one` takes of what `other` takes, in turns."""
    one(), other()
    found = []
    for number in range(pairs):
        both = (timed(one), timed(other)) if number % 2 else (timed(other), timed(one))[::-1]
        found.append(both[0] / both[1])
    return median(found)


def rows(session: Session, tokens: int = 512, pairs: int = 7) -> list[Row]:
    """Ratios of an untouched forward after traces and of capturing one layer; lens and patching."""
    model: Any = session.model
    tracer, vocabulary = session.tracer, session.map.vocabulary or 1000
    ids = [(7 * i) % (vocabulary - 10) + 5 for i in range(tokens)]
    middle = tracer.parts.names.layers // 2

    def plain() -> None:
        mx.eval(model(mx.array([ids])))

    def captured() -> None:
        with session.trace(ids) as t:
            t.layers[middle].residual.save()
            t.output.save()

    def everything() -> None:
        with session.trace(ids) as t:
            t["layers.*.residual"].save()
            t.output.save()

    def experts() -> None:
        with session.trace(ids) as t:
            t.layers[middle].experts[0].output.save()
            t.output.save()

    def lens() -> None:
        logit_lens(tracer, ids, Lens(top_k=5))

    def patched() -> None:
        other = [*ids[:8], 5 + (ids[8] + 1) % (vocabulary - 10), *ids[9:16]]
        layers = Patching(layers=[middle])
        activation_patching(tracer, ids[:16], other, "residual", "kl", layers)

    plain()
    bare = peak_above(plain)
    found = [
        ("untouched forward after traces, of plain", ratio(plain, plain, pairs), bare),
        ("capture one layer, of plain", ratio(captured, plain, pairs), peak_above(captured)),
        (
            "capture every residual, of plain",
            ratio(everything, plain, pairs),
            peak_above(everything),
        ),
        ("capture one expert, of plain", ratio(experts, plain, pairs), peak_above(experts)),
    ]
    lens()
    found.append((f"lens of {tokens} tokens, all layers, s", timed(lens), peak_above(lens)))
    patched()
    found.append(("patch 16 positions of a layer, s", timed(patched), peak_above(patched)))
    return found
