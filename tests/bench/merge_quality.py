"""What merging costs in perplexity, beside pruning to the same centroids. Prints a table.

    python tests/bench/merge_quality.py --model DIR --data DIR    # real-qwen3-moe and its data

`shrink` is the norm of a merged expert's mean output over its centroid's own, averaged over the
groups of more than one: below 1 the mean of the weights has lost part of the function.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
import numpy as np

DOMAINS = ("drama", "markdown", "medical", "python", "solidity", "wiki")


@dataclass(frozen=True)
class Outcome:
    """Perplexities over the held-out domains, and how much merged experts shrink."""

    base: float
    pruned: float
    merged: float
    shrink: float


def compare(session: Any, data: Path, count: int, metric: str, samples: int = 12) -> Outcome:
    """Merge, then prune to the same centroids, on an unedited session; nothing stays staged."""
    from mlxfun.data.expert_lists import write_expert_list
    from mlxfun.data.options import DatasetOptions
    from mlxfun.evaluation.options import EvaluateOptions
    from mlxfun.techniques.merge.options import MergeOptions
    from mlxfun.techniques.prune.options import PruneOptions

    calibration = DatasetOptions(str(data / "calib_mixed.jsonl"), max_samples=64, max_tokens=256)
    held_out = EvaluateOptions(
        tuple(
            DatasetOptions(str(data / f"eval_{name}.jsonl"), max_samples=samples, max_tokens=192)
            for name in DOMAINS
        ),
        kl=False,
    )
    report = session.merge(MergeOptions(calibration, n_prune=count, metric=metric))
    merged, shrink = session.preview(held_out), _shrink(session)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "centroids.json"
        write_expert_list(path, report.kept, session.anatomy.num_experts)
        session.prune(PruneOptions(expert_list=path))
    pruned = session.preview(held_out)
    session.discard()
    return Outcome(
        pruned.baseline["all"], pruned.perplexity["all"], merged.perplexity["all"], shrink
    )


def _shrink(session: Any) -> float:
    """See the module's text; on random inputs of unit variance, over all layers."""
    modules, plan = dict(session.model.named_modules()), session.editor.staged.plan
    ratios: list[float] = []
    sides: dict[str, list[Any]] = {"base": [], "candidate": []}
    for side, norms in sides.items():
        session.flip(side)
        for tap in session.taps.layers:
            experts = modules[tap.layer.experts]
            x = mx.random.normal((64, experts.up_proj.weight.shape[-1]), key=mx.random.key(0))
            rows = np.broadcast_to(np.arange(len(tap.live), dtype=np.uint32), (64, len(tap.live)))
            y = experts(x, mx.array(rows))
            norms.append(np.array(mx.mean(mx.linalg.norm(y, axis=-1), axis=0)))
    for layer, base, new in zip(plan.groups, sides["base"], sides["candidate"], strict=True):
        for row, (centroid, members) in enumerate(plan.groups[layer].items()):
            if len(members) > 1:
                ratios.append(float(new[row] / base[centroid]))
    return float(np.mean(ratios))


def main() -> None:
    from mlxfun import Session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n-prune", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--metric", nargs="+", default=["reap", "reap_sum"])
    arguments = parser.parse_args()
    session = Session.open(arguments.model)
    print("gone  saliency   base  pruned  merged  shrink")
    for count in arguments.n_prune:
        for metric in arguments.metric:
            o = compare(session, arguments.data, count, metric)
            print(
                f"{count:4}  {metric:8} {o.base:6.2f} {o.pruned:7.2f} {o.merged:7.2f} "
                f"{o.shrink:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
