"""What a searched ablation does to refusals on prompts that were never looked at.

    python tests/slow/ablate_table.py --model MODEL --find HARMFUL HARMLESS --judge HARMFUL HARMLESS

The first two sets find the direction, judge the trials and choose the point; the last two are only
counted on. Prints one row for the model as it is and one for each way of ablating it: plain removal
of the direction that "auto" takes, then searches of different lengths and targets.
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
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import RefusalOptions
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
    seconds: float

    def __str__(self) -> str:
        c = self.count
        return (
            f"{self.name:<28} {self.where:<9} {c.harmful:>4} of {c.of_harmful:<4}"
            f"{c.harmless:>4} of {c.of_harmless:<4} {self.first_token_kl:>9.4f} "
            f"{self.answer_kl:>9.4f} {self.seconds:>8.1f}"
        )


HEADING = (
    f"{'edit':<28} {'layer':<9} {'harmful':>12}{'harmless':>12} {'first KL':>9} {'answer KL':>9} "
    f"{'seconds':>8}"
)

Sets = tuple[DatasetOptions, DatasetOptions]


def measured(
    session: Session, options: AblateOptions, judge: Sets
) -> tuple[AblationReport, RefusalReport, float]:
    """Stage an edit and count on the judging sets. It stays staged."""
    began = monotonic()
    report = session.abliterate(options)
    seconds = monotonic() - began
    return report, session.refusals(RefusalOptions(*judge)), seconds


def rows(
    session: Session, find: Sets, judge: Sets, ways: Sequence[tuple[str, AblateOptions]]
) -> Iterator[Row]:
    """The model as it is, then one row for each way. Leaves nothing staged."""
    base = session.refusals(RefusalOptions(*judge))
    yield Row("(as it is)", "", base.after, 0.0, 0.0, 0.0)
    for name, options in ways:
        options = replace(options, harmful=find[0], harmless=find[1])
        report, counted, seconds = measured(session, options, judge)
        yield Row(
            name,
            f"{report.source_layer} {report.position}",
            counted.after,
            counted.first_token_kl,
            counted.answer_kl,
            seconds,
        )
        session.discard()


WAYS = (
    ("auto, strength 1", AblateOptions()),
    ("--layers 2, strength 1", AblateOptions(layers="2")),
    ("--layers 2, strength 2", AblateOptions(layers="2", strength="2")),
    ("--search 24", AblateOptions(search=24)),
    ("--search 24, dense-only", AblateOptions(search=24, target="dense-only")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--find", nargs=2, required=True, metavar=("HARMFUL", "HARMLESS"))
    parser.add_argument("--judge", nargs=2, required=True, metavar=("HARMFUL", "HARMLESS"))
    arguments = parser.parse_args()
    session = Session.open(arguments.model)
    find, judge = (
        (DatasetOptions(a), DatasetOptions(b)) for a, b in (arguments.find, arguments.judge)
    )
    print(HEADING)
    for row in rows(session, find, judge, WAYS):
        print(row, flush=True)


if __name__ == "__main__":
    main()
