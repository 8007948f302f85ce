"""What each option of prune is worth on a trained model: the evidence behind the README's table.

    python tests/slow/recipe_table.py --model MODEL --calibration calib.jsonl EVAL.jsonl...

One row per way of pruning and number of experts that go: perplexity as a multiple of the unpruned
model's, on samples that calibration held out and on the evaluation sets, and seconds to stage it.
Choices are made on the calibration samples and those held out, never on the evaluation sets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.slow.prune_table import arguments, opened

WAYS: Mapping[str, Mapping[str, Any]] = {
    "reap_sum": {},
    "reap_sum sequential": {"sequential": True},
    "output_error": {"metric": "output_error"},
    "output_error sequential": {"metric": "output_error", "sequential": True},
    "auto": {"metric": "auto"},
    "reap_sum refit": {"refit_experts": True},
    "output_error refit": {"metric": "output_error", "refit_experts": True},
    "auto refit": {"metric": "auto", "refit_experts": True},
}
"""Name of a row -> options of the prune."""

RECOMMENDED = "output_error refit"

HEADING = f"{'how':<24} {'go':>3} {'held out':>9} {'evaluation':>10} {'seconds':>8}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured prune: ratios of perplexities, and seconds to stage it."""

    way: str
    n_prune: int
    held_out: float
    evaluation: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.way:<24} {self.n_prune:>3} {self.held_out:>9.3f} {self.evaluation:>10.3f} "
            f"{self.seconds:>8.1f}"
        )


def rows(
    session: Session,
    calibration: DatasetOptions,
    evaluation: Sequence[DatasetOptions],
    prunes: Sequence[int],
    ways: Sequence[str] = tuple(WAYS),
) -> Iterator[Row]:
    """Each way at each number of experts; nothing is left staged."""
    session.collect(CollectOptions(calibration))
    measured = EvaluateOptions(tuple(evaluation), kl=False)
    for n_prune in prunes:
        for way in ways:
            began = perf_counter()
            session.prune(PruneOptions(n_prune=n_prune, **WAYS[way]))
            seconds = perf_counter() - began
            held_out = session.preview(EvaluateOptions(kl=False)).ratio
            yield Row(way, n_prune, held_out, session.preview(measured).ratio, seconds)
            session.discard()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=list(WAYS))
    asked = parser.parse_args()
    session, calibration, evaluation = opened(asked)
    print(HEADING)
    for row in rows(session, calibration, evaluation, asked.n_prune, asked.way):
        print(row, flush=True)
    session.close()


if __name__ == "__main__":
    main()
