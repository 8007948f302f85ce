"""What a model loses at a given size, by every way of taking bytes from its experts.

    python tests/slow/size_table.py --model MODEL --calibration calib.jsonl EVAL.jsonl...

One row per share of the experts' bytes that goes and per way: perplexity as a multiple of the whole
model's, on samples that calibration held out and on the evaluation sets, the mean KL and top-1
agreement there, the share of greedy answers that end in a loop (--answers, first the whole model's),
bytes as saved, and seconds to stage. Choices are made on the calibration samples
and those held out; the evaluation sets are looked at once for each row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.distil.options import DistilOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.slow.prune_table import arguments, opened

Way = Callable[[Session, DatasetOptions, float], None]


def _count(session: Session, share: float) -> int:
    return round(session.anatomy.num_experts * share)


def _prune(session: Session, data: DatasetOptions, share: float) -> None:
    session.prune(PruneOptions(n_prune=_count(session, share)))


def _refit(session: Session, data: DatasetOptions, share: float) -> None:
    options = PruneOptions(
        n_prune=_count(session, share), metric="output_error", refit_experts=True
    )
    session.prune(options)


def _merge(session: Session, data: DatasetOptions, share: float) -> None:
    session.merge(MergeOptions(data, n_prune=_count(session, share), refit_experts=True))


def _narrow(session: Session, data: DatasetOptions, share: float) -> None:
    session.narrow(NarrowOptions(fraction=share))


def _narrow_plain(session: Session, data: DatasetOptions, share: float) -> None:
    session.narrow(NarrowOptions(fraction=share, refit=False))


def _narrow_rms(session: Session, data: DatasetOptions, share: float) -> None:
    session.narrow(NarrowOptions(fraction=share, method="rms"))


def _merge_auto(session: Session, data: DatasetOptions, share: float) -> None:
    options = MergeOptions(data, n_prune=_count(session, share), auto=True, refit_experts=True)
    session.merge(options)


def _distilled(session: Session, data: DatasetOptions, share: float) -> None:
    _narrow(session, data, share)
    session.apply(ApplyOptions())
    session.distil(DistilOptions(data=data))


def _distilled_by_layer(session: Session, data: DatasetOptions, share: float) -> None:
    _refit(session, data, share)
    session.apply(ApplyOptions())
    session.distil(DistilOptions(local=True, data=data))


def _both(session: Session, data: DatasetOptions, share: float) -> None:
    """An eighth of the experts pruned, the rest of the bytes from the width of the others."""
    few = max(1, session.anatomy.num_experts // 8)
    options = PruneOptions(n_prune=few, metric="output_error", refit_experts=True)
    session.prune(options)
    session.apply(ApplyOptions())
    left = 1 - few / session.anatomy.num_experts
    session.collect(CollectOptions(data))
    session.narrow(NarrowOptions(fraction=1 - (1 - share) / left))


WAYS: Mapping[str, Way] = {
    "prune": _prune,
    "prune output_error refit": _refit,
    "merge refit": _merge,
    "merge auto refit": _merge_auto,
    "prune refit, local distil": _distilled_by_layer,
    "narrow no refit": _narrow_plain,
    "narrow rms refit": _narrow_rms,
    "narrow": _narrow,
    "narrow, distil": _distilled,
    "prune an eighth, narrow": _both,
}

HEADING = (
    f"{'how':<25} {'share':>5} {'held out':>9} {'evaluation':>10} {'KL':>7} {'agree':>6} "
    f"{'loops':>11} {'MiB':>7} {'seconds':>8}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured edit; see the module's text."""

    way: str
    share: float
    held_out: float
    evaluation: float
    kl: float
    agreement: float
    loops: tuple[float, float]
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.way:<25} {self.share:>5.2f} {self.held_out:>9.3f} {self.evaluation:>10.3f} "
            f"{self.kl:>7.4f} {self.agreement:>6.1%} {self.loops[0]:>5.0%} {self.loops[1]:>5.0%} "
            f"{self.bytes / 2**20:>7.1f} {self.seconds:>8.1f}"
        )


def rows(
    session: Session,
    calibration: DatasetOptions,
    evaluation: Sequence[DatasetOptions],
    shares: Sequence[float],
    ways: Sequence[str] = tuple(WAYS),
    answers: int = 0,
) -> Iterator[Row]:
    """Each way at each share; the model is back at its root afterwards."""
    measured = EvaluateOptions(tuple(evaluation), answers=answers, answer_tokens=128)
    for share in shares:
        for way in ways:
            session.collect(CollectOptions(calibration))
            began = perf_counter()
            WAYS[way](session, calibration, share)
            seconds = perf_counter() - began
            held_out = session.preview(EvaluateOptions(kl=False)).ratio
            found = session.preview(measured)
            size = session.editor.require_staged("measure").report.bytes_after
            kl, agreement = found.kl_mean or 0.0, found.top1_agreement or 0.0
            judged = (found.answers_before, found.answers)
            loops = tuple(one.loops if one is not None else float("nan") for one in judged)
            yield Row(way, share, held_out, found.ratio, kl, agreement, loops, size, seconds)
            session.discard()
            session.goto(0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--answers", type=int, default=24)
    parser.add_argument("--share", nargs="+", type=float, default=[0.25, 0.5])
    asked = parser.parse_args()
    session, calibration, evaluation = opened(asked)
    print(HEADING)
    for row in rows(session, calibration, evaluation, asked.share, asked.way, asked.answers):
        print(row, flush=True)
    session.close()


if __name__ == "__main__":
    main()
