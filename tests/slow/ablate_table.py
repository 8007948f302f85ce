"""What a searched ablation does to refusals on prompts that were never looked at.

    python tests/slow/ablate_table.py --model MODEL --find HARMFUL HARMLESS --judge HARMFUL HARMLESS \\
        --calibration TEXT --text EVAL...

The first two sets find the direction, judge the trials and choose the point; the next two are only
counted on, the perplexity is that of the evaluation texts, as a multiple of the model's own. Prints
one row for the model as it is and one for each way of ablating it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import EvaluateOptions, RefusalOptions
from mlxfun.evaluation.reports import RefusalCount, RefusalReport
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.ablate.reports import AblationReport


@dataclass(frozen=True, slots=True)
class Row:
    """One measured edit on the judging sets. seconds: to find and stage it."""

    name: str
    where: str
    count: RefusalCount
    first_token_kl: float
    answer_kl: float
    perplexity: float
    seconds: float

    def __str__(self) -> str:
        c = self.count
        return (
            f"{self.name:<28} {self.where:<9} {c.harmful:>4} of {c.of_harmful:<4}"
            f"{c.harmless:>4} of {c.of_harmless:<4} {self.first_token_kl:>9.4f} "
            f"{self.answer_kl:>9.4f} {self.perplexity:>10.4f} {self.seconds:>8.1f}"
        )


HEADING = (
    f"{'edit':<28} {'layer':<9} {'harmful':>12}{'harmless':>12} {'first KL':>9} {'answer KL':>9} "
    f"{'perplexity':>10} {'seconds':>8}"
)

Sets = tuple[DatasetOptions, DatasetOptions]


def measured(
    session: Session, options: AblateOptions, judge: Sets
) -> tuple[AblationReport, RefusalReport, float]:
    """Stage an edit and count on the judging sets. It stays staged."""
    began = monotonic()
    report = session.abliterate(options)
    seconds = monotonic() - began
    return report, session.refusals(RefusalOptions(*judge, 100)), seconds


def rows(
    session: Session,
    find: Sets,
    judge: Sets,
    ways: Sequence[tuple[str, AblateOptions]],
    text: EvaluateOptions,
) -> Iterator[Row]:
    """The model as it is, then one row for each way. Leaves nothing staged."""
    base = session.refusals(RefusalOptions(*judge, 100))
    yield Row("(as it is)", "", base.after, 0.0, 0.0, 1.0, 0.0)
    for name, options in ways:
        options = replace(options, harmful=find[0], harmless=find[1])
        report, counted, seconds = measured(session, options, judge)
        yield Row(
            name,
            f"{report.source_layer} {report.position}",
            counted.after,
            counted.first_token_kl,
            counted.answer_kl,
            session.preview(text).ratio,
            seconds,
        )
        session.discard()


WAYS = (
    ("strength 1", AblateOptions()),
    ("strength 0.5", AblateOptions(strength="0.5")),
    ("orthogonal, auto", AblateOptions(projection="orthogonal")),
    ("orthogonal --layers 2", AblateOptions(projection="orthogonal", layers="2")),
    ("--search 24", AblateOptions(search=24)),
    ("--search 24, dense-only", AblateOptions(search=24, target="dense-only")),
    ("--search 24, orthogonal", AblateOptions(search=24, projection="orthogonal")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--find", nargs=2, required=True, metavar=("HARMFUL", "HARMLESS"))
    parser.add_argument("--judge", nargs=2, required=True, metavar=("HARMFUL", "HARMLESS"))
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True, metavar="EVAL")
    parser.add_argument("--way", nargs="+", default=[name for name, _ in WAYS])
    arguments = parser.parse_args()
    session = Session.open(arguments.model)
    session.collect(
        CollectOptions(DatasetOptions(arguments.calibration, max_samples=64, max_tokens=256))
    )
    sets = tuple(DatasetOptions(source, max_tokens=256) for source in arguments.text)
    find, judge = (
        (DatasetOptions(a), DatasetOptions(b)) for a, b in (arguments.find, arguments.judge)
    )
    print(HEADING)
    ways = [way for way in WAYS if way[0] in arguments.way]
    for row in rows(session, find, judge, ways, EvaluateOptions(sets, kl=False)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
