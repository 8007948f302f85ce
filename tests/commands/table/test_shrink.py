"""The lines of `distil`, `bits`, `save --quantize PLAN` and `tasks`, as far as the session's call."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from commands.output.render.dispatch import render
from mlxfun.checkpoint.bits_plan import read_bits
from mlxfun.evaluation.task_options import TaskReport
from mlxfun.techniques.bits.reports import BitsReport
from mlxfun.techniques.distil.reports import DistilReport
from tests.commands.conftest import Bench


def shown(report: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_distil_says_what_both_texts_lost_and_gained(bench: Bench) -> None:
    (ended,) = bench.do("distil --train moe --passes 2")
    report = ended.report
    assert isinstance(report, DistilReport)
    assert report.summary() == (
        "staged distil of router and experts: held-out KL 0.2500 -> 0.1250 nats, perplexity 9.50 -> "
        "9.25 (9.00 in the checkpoint), step 4 of 6"
    )
    text = shown(report)
    assert "held out" in text
    assert "fitted" in text


def test_bits_writes_a_plan_that_save_takes(bench: Bench, tmp_path: Path) -> None:
    (ended,) = bench.do(f"bits --to-bytes 1kB --choices 2,4 --output {tmp_path / 'p.json'}")
    report = ended.report
    assert isinstance(report, BitsReport)
    assert read_bits(Path(report.path)).bits == {"layers.0.mlp": 4}
    assert "as chosen" in shown(report)
    bench.do(f"save {tmp_path / 'm'} --quantize {tmp_path / 'p.json'}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bits --to-bytes 1kB --choices two", "--choices two: give numbers of bits"),
        ("bits --to-bytes 1kB --output p.txt", "must end in .json"),
        ("save m --quantize five", "'five' is none of 2, 3, 4, 5, 6, 8"),
        ("save m --quantize nothing.json", "bits --to-bytes SIZE"),
        ("tasks", "NAMES"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(bench: Bench, line: str, said: str) -> None:
    assert said in (bench.run(line).error or "")


def test_tasks_are_shown_with_their_errors(bench: Bench) -> None:
    (ended,) = bench.do("tasks arc_easy hellaswag --limit 4")
    report = ended.report
    assert isinstance(report, TaskReport)
    assert report.summary() == "tasks of the current model (at most 4 documents): arc_easy acc 0.5"
    assert "0.0625" in shown(report)
