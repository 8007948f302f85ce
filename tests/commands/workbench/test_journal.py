"""Session files: what a recording holds while it grows, and how it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.workbench.session_file import decode, encode, read_script
from mlxfun.errors import UsageError
from mlxfun.events import RoutingFrame
from tests.commands.conftest import SESSION, Bench, body

MakeBench = Callable[..., Bench]


def test_a_recording_holds_header_commands_and_the_state_after_each(recorded: Path) -> None:
    lines = recorded.read_text().splitlines()
    assert lines[0] == "#!mlxfun-session 2"
    assert lines[1] == "#: mlxfun 0.1.0"
    assert [x.split()[1] for x in lines[2:7]] == ["mlx", "mlx-lm", "seed", "model", "checkpoint"]
    assert lines[4:6] == ["#: seed 1", "#: model demo"]
    assert lines[6] == "#: checkpoint checkpoint-of-demo"
    start = body(recorded)[1].split()[2]
    assert body(recorded)[:4] == [
        "collect --dataset demo:mixed --max-samples 4",
        f"#= state {start}",
        "prune --n-prune 4 --metric reap_sum",
        f"#= state {start} staged {body(recorded)[9].split()[2]}",
    ]
    assert [x for x in body(recorded) if not x.startswith("#")] == list(SESSION)


def test_every_line_is_on_disk_before_the_next_one_starts(bench: Bench, here: Path) -> None:
    bench.do("record s.mlxfun")
    for line in ("info", "history"):
        bench.do(line)
        assert body(here / "s.mlxfun")[-2] == line


def test_the_line_that_is_running_is_already_on_disk(make_bench: MakeBench, here: Path) -> None:
    gate = threading.Event()
    bench = make_bench(gate=gate)
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo")
    bench.engine.run("collect --dataset demo:mixed")
    bench.until(lambda e: isinstance(e, RoutingFrame))
    assert body(here / "s.mlxfun") == ["collect --dataset demo:mixed"]
    gate.set()


def test_a_failed_command_becomes_a_comment(bench: Bench, here: Path) -> None:
    bench.do("record s.mlxfun")
    bench.run("undo")
    bench.run("prun")
    bench.do("info")
    assert body(here / "s.mlxfun") == [
        "# failed: undo",
        "#         nothing to undo: this is the model as loaded",
        "info",
        f"#= state {bench.sessions[0].state}",
    ]


def test_recording_may_begin_late_and_still_holds_everything(bench: Bench, here: Path) -> None:
    bench.do("info", "collect --dataset demo:mixed", "record s.mlxfun", "prune --n-prune 1")
    commands = [x for x in body(here / "s.mlxfun") if not x.startswith("#")]
    assert commands == ["info", "collect --dataset demo:mixed", "prune --n-prune 1"]
    assert "#: model demo" in (here / "s.mlxfun").read_text()


def test_recording_can_be_stopped(bench: Bench, here: Path) -> None:
    bench.do("record s.mlxfun", "info")
    (stopped,) = bench.do("record --stop")
    assert stopped.report is not None
    assert stopped.report.summary() == "recorded s.mlxfun"
    size = (here / "s.mlxfun").stat().st_size
    bench.do("info")
    assert (here / "s.mlxfun").stat().st_size == size


def test_an_older_recording_is_moved_aside_and_other_files_are_left_alone(
    bench: Bench, here: Path
) -> None:
    bench.do("record s.mlxfun", "record --stop")
    (second,) = bench.do("record s.mlxfun")
    assert second.report is not None
    assert second.report.summary() == (
        "recording to s.mlxfun (the older recording is now s.mlxfun.1)"
    )
    (here / "notes.txt").write_text("mine")
    ended = bench.run("record notes.txt")
    assert ended.error == ("notes.txt exists and is not a session recording: choose another name")
    assert (here / "notes.txt").read_text() == "mine"
    ended = bench.run("record no/such/dir/s.mlxfun")
    assert ended.error == "cannot record to no/such/dir/s.mlxfun: No such file or directory"


def test_a_cancelled_collect_is_recorded_with_a_warning(make_bench: MakeBench, here: Path) -> None:
    bench = make_bench(gate=threading.Event())
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo")
    job = bench.engine.run("collect --dataset demo:mixed --max-samples 9")
    bench.until(lambda e: isinstance(e, RoutingFrame))
    bench.engine.cancel()
    bench.end_of(job)
    assert body(here / "s.mlxfun")[-1].startswith("# cancelled after 1 of 9 samples: a replay")


@pytest.mark.parametrize(
    "line",
    [
        "chat 'two\nlines'",
        "chat '[bold]markup[/]'",
        "chat \x1b[31mred",
        "chat non\u2028separators and \x85 too",
        "chat '#not a comment'",
        "chat \ud800",
    ],
)
def test_any_line_survives_being_written_and_read(
    line: str, make_bench: MakeBench, here: Path
) -> None:
    assert "\n" not in encode(line)
    assert decode(encode(line)) == line
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo", line)
    assert [e.line for e in read_script(here / "s.mlxfun").entries] == [line]


def test_reading_gives_commands_with_their_line_numbers(here: Path) -> None:
    (here / "s.mlxfun").write_text("# hello\n\n#: seed 7\ninfo\r\n#= state a staged b\n  undo  \n")
    script = read_script(here / "s.mlxfun")
    assert script.seed == 7
    assert [(e.number, e.line, str(e.mark)) for e in script.entries] == [
        (4, "info", "state a staged b"),
        (6, "undo", "None"),
    ]
    with pytest.raises(UsageError, match="Is a directory"):
        read_script(here)
