"""`--to PATH` of edits: a model directory is written, and nothing is staged."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from commands.output.render.dispatch import render
from commands.registry import meant
from mlxfun.editing.reports import WrittenReport
from mlxfun.events import Notice
from tests.commands.conftest import Bench

LINES = [
    "prune --n-prune 2 --refit-experts",
    "merge --dataset demo:mixed --max-samples 4 --n-prune 2",
    "narrow --fraction 0.25",
    "distil --passes 1",
    "abliterate --harmful demo:harmful --harmless demo:harmless",
]


@pytest.mark.parametrize("line", LINES)
def test_a_directory_is_written_and_nothing_is_staged(
    line: str, bench: Bench, tmp_path: Path
) -> None:
    place = tmp_path / "it's new"
    (ended,) = bench.do(f'{line} --to "{place}"')
    report = ended.report
    assert isinstance(report, WrittenReport)
    assert report.path == str(place)
    assert "the model in memory is as before" in report.summary()
    assert bench.sessions[0].plan is None
    # The recipe is that of staging: played again, it must not write to a place.
    assert report.notices == (f"recipe: {line}",)
    assert bench.sessions[0].command == f'{line} --to "{place}"'
    (refused,) = [bench.run(f'{line} --to "{place}"')]
    assert refused.error is not None
    assert "--force" in refused.error
    bench.do(f'{line} --force --to="{place}"')


@pytest.mark.parametrize("line", LINES)
def test_force_alone_is_refused(line: str, bench: Bench) -> None:
    assert "--force goes with --to PATH" in (bench.run(f"{line} --force").error or "")


@pytest.mark.parametrize("line", LINES)
def test_a_resumed_session_does_not_write_again(line: str) -> None:
    assert meant(f"{line} --to out").read_only
    assert not meant(line).read_only


def test_limits_that_cannot_be_checked_are_said(bench: Bench, tmp_path: Path) -> None:
    bench.do("set max-kl 0.1", f"narrow --width 8 --to {tmp_path / 'm'}")
    said = [event.text for event in bench.events if isinstance(event, Notice)]
    assert any("limits that are set for apply are not checked" in text for text in said)


def test_what_was_done_is_shown_before_where_it_is(bench: Bench, tmp_path: Path) -> None:
    (ended,) = bench.do(f"prune --n-prune 2 --refit-experts --to {tmp_path / 'm'}")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(ended.report))
    shown = capture.get()
    assert shown.index("wrote prune") < shown.index("check load")
