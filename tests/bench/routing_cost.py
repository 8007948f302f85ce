"""What observing and steering cost, as ratios within one run, on a model of a given shape.

    python tests/bench/routing_cost.py --preset qwen3-30b-a3b     # needs a GPU with 40 GB
    python tests/bench/routing_cost.py --preset small             # a laptop, or the CPU backend

Prints one JSON object. Every ratio compares alternating runs of the same work in one process, so
that clocks, caches and neighbours weigh on both sides alike; the median of the pairs is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
import numpy as np

PRESETS = {
    "qwen3-30b-a3b": {
        "layers": 12, "experts": 128, "top_k": 8, "hidden": 2048, "width": 768, "heads": 32,
        "kv_heads": 4, "head_dim": 128, "vocab": 151_936, "dtype": "bfloat16",
        "rows": 8, "length": 2048,
    },
    "small": {
        "layers": 4, "experts": 32, "top_k": 4, "hidden": 256, "width": 128, "heads": 4,
        "kv_heads": 2, "head_dim": 64, "vocab": 8192, "dtype": "float32", "rows": 2, "length": 256,
    },
}  # fmt: skip


def build(shape: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A random Qwen3-MoE of this shape, evaluated, in its dtype."""
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    config = {
        "model_type": "qwen3_moe", "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"], "intermediate_size": shape["width"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"], "num_experts": shape["experts"],
        "num_experts_per_tok": shape["top_k"], "moe_intermediate_size": shape["width"],
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "vocab_size": shape["vocab"], "rope_theta": 1e6,
        "tie_word_embeddings": False, "max_position_embeddings": 32768,
    }  # fmt: skip
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, shape["dtype"]))
    model.eval()
    mx.eval(model.parameters())
    return model, config


def timed(work: Callable[[], None]) -> float:
    mx.synchronize()
    began = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - began


def ratio(plain: Callable[[], None], other: Callable[[], None], pairs: int) -> dict[str, float]:
    """Median seconds of both, and the median of the ratios of neighbouring runs."""
    return ratio_of(lambda: timed(plain), lambda: timed(other), pairs)


def ratio_of(
    plain: Callable[[], float], other: Callable[[], float], pairs: int
) -> dict[str, float]:
    """The same for two that take their own time, in seconds."""
    plain(), other(), plain(), other()
    runs = [(plain(), other()) for _ in range(pairs)]
    return {
        "plain_s": median(a for a, _ in runs),
        "other_s": median(b for _, b in runs),
        "ratio": median(b / a for a, b in runs),
        "spread": max(b / a for a, b in runs) - min(b / a for a, b in runs),
    }


def collect_ratio(rig: Any, shape: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Full statistics against a plain forward of the same batch, with and without the head."""
    from mlxfun.calibration import collect
    from mlxfun.calibration.routing_stats import RoutingStats

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab"], (shape["rows"], shape["length"])).astype(np.int32)
    batch = SimpleNamespace(
        tokens=tokens, mask=np.ones_like(tokens, dtype=bool), rows=tuple(range(len(tokens)))
    )
    start = RoutingStats.empty(rig.anatomy.indices, shape["experts"])

    def statistics() -> None:
        collect.collect(rig.model, rig.taps, [batch], start)

    def forward() -> None:
        mx.eval(rig.model(mx.array(tokens)))

    def body() -> None:
        mx.eval(rig.model.model(mx.array(tokens)))

    found = {
        "against the forward": ratio(forward, statistics, pairs),
        "against the forward without its head": ratio(body, statistics, pairs),
    }
    found["tokens_per_second"] = tokens.size / found["against the forward"]["other_s"]
    return found


def decode(rig: Any, steps: int, recording: Any = None) -> None:
    """Decode one token at a time. recording: what is drained after each step, None for nothing."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(rig.model)
    y = mx.array([[1]])
    for _ in range(steps):
        logits = rig.model(y, cache=cache)[:, -1]
        y = mx.argmax(logits, axis=-1)[None]
        lazy = []
        if recording is not None:
            lazy = [a for layer in recording.drain() for r in layer for a in r.arrays()]
        mx.eval(y, *lazy)


def decode_ratio(rig: Any, pairs: int, steps: int = 32) -> dict[str, Any]:
    """Decoding one token at a time: untapped, tapped, recording, steered."""
    from mlxfun.steering.rules import Steering

    def tapped() -> None:
        decode(rig, steps)

    def untapped() -> None:
        rig.taps.detach()
        decode(rig, steps)
        rig.taps.attach()

    def recorded(norms: bool) -> None:
        with rig.taps.recording(norms=norms) as recording:
            decode(rig, steps, recording)

    indices = rig.anatomy.indices
    up, down = dict.fromkeys(indices, (1,)), dict.fromkeys(indices, (2, 3))
    installing: list[float] = []

    def steered(steering: Steering) -> dict[str, float]:
        return steered_ratio(rig, steering, tapped, pairs, installing)

    return {
        "tapped": ratio(untapped, tapped, pairs),
        "routing per token": ratio(untapped, lambda: recorded(norms=False), pairs),
        "routing and norms per token": ratio(untapped, lambda: recorded(norms=True), pairs),
        "one expert steered": steered(Steering({indices[0]: (1,)})),
        "every layer: one in": steered(Steering(up)),
        "every layer: two out": steered(Steering({}, down)),
        "every layer: one in, two out": steered(Steering(up, down)),
        "every layer: a fader": steered(Steering(levels={key: {1: 0.5} for key in indices})),
        "installing_ms": median(installing) * 1000,
    }


def steered_ratio(
    rig: Any, steering: Any, run: Callable[[], None], pairs: int, installing: list[float]
) -> dict[str, float]:
    """The decoding alone: a steering is installed once and then meets every token."""
    from mlxfun.steering import rules as steer
    from mlxfun.steering.rules import Steering

    def timed_steered() -> float:
        installing.append(timed(lambda: steer.install(steering, rig.resident, rig.taps)))
        seconds = timed(run)
        steer.install(Steering(), rig.resident, rig.taps)
        return seconds

    return ratio_of(lambda: timed(run), timed_steered, pairs)


def edit_times(rig: Any, shape: dict[str, Any]) -> dict[str, float]:
    """Milliseconds to stage, flip, undo and redo a prune of a quarter of the experts."""
    from mlxfun.techniques.prune.delta import prune_delta, validate
    from mlxfun.techniques.prune.plan import PrunePlan

    keep = tuple(range(shape["experts"] // 4, shape["experts"]))
    plan = PrunePlan(dict.fromkeys(rig.anatomy.indices, keep))
    out: dict[str, float] = {}

    def stage() -> None:
        validate(plan, rig.resident)
        out["_edge"] = rig.resident.swap(prune_delta(plan, rig.resident))

    def swap() -> None:
        out["_edge"] = rig.resident.swap(out["_edge"])

    out["first_stage_ms"] = timed(stage) * 1000  # CUDA compiles its gather kernel here, once
    swap()
    out["stage_ms"] = timed(stage) * 1000
    out["flip_ms"] = timed(swap) * 1000
    swap()
    out["undo_ms"] = timed(swap) * 1000
    out["redo_ms"] = timed(swap) * 1000
    out["held_bytes"] = out["_edge"].bytes + sum(
        a.nbytes for layer in out["_edge"].layers for a in layer.arrays.values()
    )
    swap()
    del out["_edge"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    shape = PRESETS[arguments.preset]
    print(json.dumps(measure(shape, arguments.pairs), indent=1))


def measure(shape: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Everything above on one model."""
    from mlxfun.hooks.routing import Taps
    from mlxfun.model.anatomy import discover
    from mlxfun.model.delta import Resident

    model, config = build(shape)
    anatomy = discover(model, config)
    resident = Resident(model, anatomy, lambda: {}.__getitem__)
    taps = Taps(model, anatomy, resident.layers)
    taps.attach()
    rig = SimpleNamespace(model=model, anatomy=anatomy, taps=taps, resident=resident)
    size = sum(a.nbytes for _, a in _flat(model))
    edits = edit_times(rig, shape)
    return {
        "device": str(mx.default_device()),
        "shape": shape,
        "model_bytes": size,
        "collect": collect_ratio(rig, shape, pairs),
        "decode": decode_ratio(rig, pairs),
        "edits": {**edits, "held_share": edits["held_bytes"] / size},
        "peak_bytes": mx.get_peak_memory(),
    }


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


if __name__ == "__main__":
    main()
