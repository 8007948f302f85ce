"""What merging costs: seconds per layer, their growth with the layers, and the ratio to a forward.

    python tests/bench/merge_cost.py --preset small               # a laptop, or the CPU backend
    python tests/bench/merge_cost.py --preset qwen3-30b-a3b       # needs a GPU with 40 GB
    python tests/bench/merge_cost.py --model PATH --data JSONL    # a model and text of one's own

Prints one JSON object. The ratio compares merging with one plain forward of the same batches in
the same process, run before and after it, so that the load of the machine weighs on both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import mlx.core as mx
import numpy as np

SHAPES = {
    "small": {
        "experts": 32, "top_k": 4, "hidden": 256, "width": 128, "heads": 4, "kv_heads": 2,
        "head_dim": 64, "vocab": 8192, "dtype": "float32", "rows": 8, "length": 256, "prune": 8,
    },
    "qwen3-30b-a3b": {
        "experts": 128, "top_k": 8, "hidden": 2048, "width": 768, "heads": 32, "kv_heads": 4,
        "head_dim": 128, "vocab": 151_936, "dtype": "bfloat16", "rows": 64, "length": 256,
        "prune": 32,
    },
}  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    mx.synchronize()
    began = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - began


def forward(model: Any, batches: Sequence[Any]) -> None:
    for batch in batches:
        mx.eval(model.model(mx.array(batch.tokens)))


def random_model(shape: dict[str, Any], layers: int) -> dict[str, Any]:
    """Seconds of a plain forward and of a merge of a random model with this many layers."""
    from rigs import make_rig
    from routing_cost import build

    from mlxfun.data.datasets import batches
    from mlxfun.data.options import DatasetOptions
    from mlxfun.techniques.merge.delta import Merger
    from mlxfun.techniques.merge.options import MergeOptions

    model, config = build({**shape, "layers": layers})
    rig = make_rig(model, config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab"], (shape["rows"], shape["length"])).astype(np.int32)
    from mlxfun.model.device.batch_size import CPU_BATCH

    given = batches(list(tokens), *CPU_BATCH)
    kept = shape["experts"] - shape["prune"]

    def choose(_: int, stats: Any) -> tuple[int, ...]:
        best = np.argsort(-stats.score("reap")[0], kind="stable")[:kept]
        return tuple(sorted(int(e) for e in best))

    merger = Merger(rig, MergeOptions(DatasetOptions("random")))
    forward(model, given)
    plain = seconds(lambda: forward(model, given))
    merge = seconds(lambda: merger.run(given, choose))
    plain = (plain + seconds(lambda: forward(model, given))) / 2
    return {"layers": layers, "tokens": int(tokens.size), "forward_s": plain, "merge_s": merge,
            "per_layer_s": merge / layers, "ratio": merge / plain,
            "peak_bytes": mx.get_peak_memory()}  # fmt: skip


def real_model(model: str, data: str, count: int) -> dict[str, Any]:
    """The same for a checkpoint and a data set, 64 samples of 256 tokens."""
    from mlxfun import Session
    from mlxfun.data.options import DatasetOptions
    from mlxfun.techniques.merge.options import MergeOptions

    session = Session.open(model)
    from mlxfun.techniques.merge import technique

    options = MergeOptions(DatasetOptions(data, max_samples=64, max_tokens=256), n_prune=count)
    given = technique.MergeRequest.of(session._workspace, options).batches
    forward(session.model, given)
    plain = seconds(lambda: forward(session.model, given))
    merge = seconds(lambda: session.merge(options))
    plain = (plain + seconds(lambda: forward(session.model, given))) / 2
    layers = len(session.anatomy.layers)
    return {"layers": layers, "tokens": sum(int(b.mask.sum()) for b in given),
            "forward_s": plain, "merge_s": merge, "per_layer_s": merge / layers,
            "ratio": merge / plain}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--n-prune", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.model:
        runs = [real_model(arguments.model, arguments.data, arguments.n_prune)]
    else:
        runs = [random_model(SHAPES[arguments.preset], n) for n in arguments.layers]
    print(json.dumps({"device": str(mx.default_device()), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
