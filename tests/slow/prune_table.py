"""How much perplexity each metric costs on a trained model: the evidence behind the default.

    python tests/slow/prune_table.py --model MODEL --calibration calib.jsonl EVAL.jsonl...

Prints one row per metric and number of pruned experts: the perplexity over all tokens of all sets
together, and the geometric mean over the sets, which weighs short sets as much as long ones. One
calibration serves every row; each is staged, measured and discarded, as a person would do it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlxfun import Session
from mlxfun.calibration.options import METRICS, CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import PruneOptions


@dataclass(frozen=True, slots=True)
class Row:
    """One measured plan; metric None and n_prune 0 for the model as it is."""

    metric: str | None
    n_prune: int
    pooled: float
    per_set_mean: float

    def __str__(self) -> str:
        name = self.metric or "(not pruned)"
        return f"{name:<14} {self.n_prune:>3} {self.pooled:>9.2f} {self.per_set_mean:>9.2f}"


HEADING = f"{'metric':<14} {'go':>3} {'pooled':>9} {'per set':>9}"


def rows(
    session: Session,
    calibration: DatasetOptions,
    evaluation: Sequence[DatasetOptions],
    prunes: Sequence[int],
    metrics: Sequence[str] = METRICS,
) -> Iterator[Row]:
    """The base row, then one row per number of experts and metric. Leaves nothing staged."""
    measured = EvaluateOptions(tuple(evaluation), kl=False)
    session.steer(SteerOptions(clear=True))
    session.collect(CollectOptions(calibration))
    yield _row(None, 0, session.evaluate(measured))
    for n_prune in prunes:
        for metric in metrics:
            session.prune(PruneOptions(n_prune=n_prune, metric=metric))
            yield _row(metric, n_prune, session.preview(measured))
            session.discard()


def _row(metric: str | None, n_prune: int, report: EvaluateReport) -> Row:
    each = [value for name, value in report.perplexity.items() if name != "all"]
    mean = exp(fmean(map(log, each)))
    return Row(metric, n_prune, report.perplexity["all"], mean)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every table of prunes asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--n-prune", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("evaluation", nargs="+")
    return parser


def opened(asked: argparse.Namespace) -> tuple[Session, DatasetOptions, list[DatasetOptions]]:
    """(session, calibration set, evaluation sets) that the arguments name."""
    calibration = DatasetOptions(
        asked.calibration, max_samples=asked.samples, max_tokens=asked.tokens, seed=asked.seed
    )
    evaluation = [DatasetOptions(source, max_tokens=asked.tokens) for source in asked.evaluation]
    return Session.open(asked.model, seed=asked.seed), calibration, evaluation


def main() -> None:
    asked = arguments(__doc__).parse_args()
    session, calibration, evaluation = opened(asked)
    print(HEADING)
    for row in rows(session, calibration, evaluation, asked.n_prune):
        print(row, flush=True)
    session.close()


if __name__ == "__main__":
    main()
