"""Replays: what a session file does when it is run again, and where it stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from commands.scripts.replay import ReplayReport
from commands.workbench.files import Files
from mlxfun.events import JobEnded, Notice, RoutingFrame
from tests.commands.conftest import SESSION, Bench

MakeBench = Callable[..., Bench]


def inner(bench: Bench) -> list[JobEnded]:
    return [e for e in bench.events if isinstance(e, JobEnded)]


def test_a_replay_loads_the_model_and_reproduces_every_state(
    make_bench: MakeBench, recorded: Path
) -> None:
    bench = make_bench()
    ended = bench.run("replay s.mlxfun")
    report = ended.report
    assert isinstance(report, ReplayReport), ended.error
    assert (report.commands, report.compared, report.expectations) == (8, 8, 1)
    assert [e.line for e in inner(bench)] == ["load demo", *SESSION, "replay s.mlxfun"]
    assert bench.sessions[0].seed == 1
    output = Path(report.output_root)
    assert (output / "out" / "config.json").is_file()
    assert not output.is_relative_to(recorded.parent)
    notices = [e.text for e in bench.events if isinstance(e, Notice)]
    assert notices == [f"replaying s.mlxfun; what it saves goes below {output}"]


def test_what_a_replay_saves_goes_below_the_output_root(
    make_bench: MakeBench, recorded: Path, here: Path
) -> None:
    (here / "out" / "config.json").write_text("precious")
    bench = make_bench(output_root=here / "root")
    bench.do("replay s.mlxfun")
    assert (here / "root" / "out" / "config.json").is_file()
    assert (here / "out" / "config.json").read_text() == "precious"


@pytest.mark.parametrize("target", ["/../out/../..", "../out", "a/../../out"])
def test_a_replay_refuses_to_save_outside_its_output_root(
    make_bench: MakeBench, here: Path, target: str
) -> None:
    (here / "s.mlxfun").write_text(f"load demo\nsave {target}\n")
    ended = make_bench(output_root=here / "root").run("replay s.mlxfun")
    assert ended.error == (
        f"s.mlxfun:2: save {target}: {target} lies outside the output root {here / 'root'}: use a "
        "path below it, or choose another with --output-root"
    )
    assert sorted(p.name for p in here.iterdir()) == ["s.mlxfun"]


def test_a_replay_that_saves_nothing_leaves_no_temporary_directory(
    make_bench: MakeBench, here: Path
) -> None:
    (here / "s.mlxfun").write_text("load demo\ninfo\n")
    bench = make_bench()
    report = bench.run("replay s.mlxfun").report
    assert isinstance(report, ReplayReport)
    assert not Path(report.output_root).exists()


def test_a_replay_stops_at_the_first_difference_and_names_it(
    make_bench: MakeBench, recorded: Path
) -> None:
    text = recorded.read_text().replace("prune --n-prune 4", "prune --n-prune 3")
    recorded.write_text(text)
    bench = make_bench()
    ended = bench.run("replay s.mlxfun")
    number = text.splitlines().index("prune --n-prune 3 --metric reap_sum") + 1
    marks = [x.removeprefix("#= ") for x in text.splitlines() if x.startswith("#= ")]
    plan = bench.sessions[0].plan
    assert plan is not None
    assert ended.error == (
        f"s.mlxfun:{number}: after 'prune --n-prune 3 --metric reap_sum' expected {marks[1]}, "
        f"found {marks[0]} staged {plan.state_after}"
    )
    assert [e.line for e in inner(bench)][-2:] == [
        "prune --n-prune 3 --metric reap_sum",
        "replay s.mlxfun",
    ]


def test_a_failing_expectation_stops_the_replay_with_what_was_found(
    make_bench: MakeBench, recorded: Path
) -> None:
    recorded.write_text(recorded.read_text().replace("<= 16", "<= 14.2"))
    ended = make_bench().run("replay s.mlxfun")
    assert ended.error == (
        "s.mlxfun:14: expect perplexity.all <= 14.2: expect perplexity.all <= 14.2: found 16.0"
    )


def test_a_failing_command_stops_the_replay_unless_it_is_to_keep_going(
    make_bench: MakeBench, here: Path
) -> None:
    (here / "s.mlxfun").write_text("load demo\nundo\ninfo\n")
    bench = make_bench()
    ended = bench.run("replay s.mlxfun")
    assert ended.error == "s.mlxfun:2: undo: nothing to undo: this is the model as loaded"
    assert [e.line for e in inner(bench)] == ["load demo", "undo", "replay s.mlxfun"]
    bench = make_bench()
    ended = bench.run("replay s.mlxfun --keep-going")
    assert ended.error == (
        "1 of 3 commands failed, the first at s.mlxfun:2: undo: nothing to undo: this is the model "
        "as loaded"
    )
    assert [e.line for e in inner(bench)][-2] == "info"


def test_a_failure_that_is_expected_is_none(make_bench: MakeBench, here: Path) -> None:
    (here / "s.mlxfun").write_text('load demo\nundo\n# as it should\nexpect error "to undo"\n')
    report = make_bench().run("replay s.mlxfun").report
    assert isinstance(report, ReplayReport)
    assert report.expectations == 1
    (here / "s.mlxfun").write_text("load demo\nundo\nexpect error disk\n")
    ended = make_bench().run("replay s.mlxfun")
    assert ended.error is not None
    assert ended.error.endswith(
        "expect error disk: the error was 'nothing to undo: this is the model as loaded'"
    )


def test_a_replay_refuses_another_checkpoint_and_names_both(
    make_bench: MakeBench, recorded: Path
) -> None:
    bench = make_bench(seed=1)
    bench.do("load other")
    ended = bench.run("replay s.mlxfun")
    assert ended.error == (
        "s.mlxfun was recorded on demo (checkpoint checkpoint-of-demo), the resident model is other "
        "(checkpoint checkpoint-of-other): load demo"
    )
    assert len(bench.sessions[0].nodes) == 1


def test_a_replay_on_an_edited_model_is_refused_before_anything_runs(
    make_bench: MakeBench, recorded: Path
) -> None:
    bench = make_bench(seed=1)
    bench.do("load demo", "collect --dataset demo:mixed", "prune --n-prune 1")
    ended = bench.run("replay s.mlxfun")
    assert ended.error is not None
    assert "begins at the model as loaded" in ended.error
    assert ended.error.endswith("discard what is staged and go to node 0, or load it again")


def test_a_recording_by_other_versions_is_replayed_with_a_warning(
    make_bench: MakeBench, here: Path
) -> None:
    (here / "s.mlxfun").write_text("#!mlxfun-session 1\n#: mlxfun 0.0.9\nload demo\n")
    bench = make_bench()
    bench.do("replay s.mlxfun")
    warnings = [e.text for e in bench.events if isinstance(e, Notice) and e.level == "warning"]
    assert warnings == ["s.mlxfun was recorded with mlxfun 0.0.9, this is 0.1.0"]


def test_relative_data_sets_are_found_beside_the_script_but_here_first(
    make_bench: MakeBench, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "scripts").mkdir()
    for name in ("scripts/a.jsonl", "scripts/b.jsonl", "b.jsonl"):
        (here / name).touch()
    (here / "scripts" / "s.mlxfun").write_text(
        "load demo\n"
        f"collect --dataset a.jsonl\nexpect dataset == {here}/scripts/a.jsonl\n"
        "collect --dataset b.jsonl\nexpect dataset == b.jsonl\n"
    )
    make_bench().do("replay scripts/s.mlxfun")


def test_a_replay_reads_what_it_wrote(make_bench: MakeBench, here: Path) -> None:
    (here / "s.mlxfun").write_text(
        "load demo\ncollect --dataset demo:mixed --max-samples 5\nstats save a.npz\nstats reset\n"
        "stats load a.npz\nexpect samples == 5\n"
    )
    make_bench().do("replay s.mlxfun")
    assert not (here / "a.npz").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("load demo\nprun --n-prune 4\n", "s.mlxfun:2: unknown command 'prun': did you mean"),
        ("load demo\nprune --n-prune x\n", "s.mlxfun:2: prune: invalid value for '--n-prune'"),
        ("load demo\n#= stat abc\n", "s.mlxfun:2: '#= stat abc' is not of the form '#= state ID'"),
        ("#= state abc\nload demo\n", "s.mlxfun:1: '#= state abc' follows no command"),
        ("info\n#= state a\n#= state b\n", "s.mlxfun:3: '#= state b' follows no command"),
        (
            "#!mlxfun-session 9\ninfo\n",
            "s.mlxfun:1: session format '9' is unknown, this program reads 1 and 2",
        ),
        ("#: colour red\ninfo\n", "s.mlxfun:1: header line 'colour' is not one of mlxfun, mlx,"),
        ("#: seed x\ninfo\n", "s.mlxfun:1: the seed 'x' is not a whole number"),
        ('info\n"unclosed\n', "s.mlxfun:2: Unterminated string"),
        ("info\nsave 'out\n", "s.mlxfun:2: save: a quote is not closed in"),
        ("replay s.mlxfun\n", "s.mlxfun:1: a replay cannot start another one"),
        ("# nothing\n\n", "s.mlxfun holds no command"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line_before_anything_runs(
    make_bench: MakeBench, here: Path, text: str, message: str
) -> None:
    (here / "s.mlxfun").write_text(text)
    bench = make_bench()
    ended = bench.run("replay s.mlxfun")
    assert ended.usage
    assert ended.error is not None
    assert ended.error.startswith(message)
    assert bench.sessions == []


def test_a_script_that_cannot_be_read_says_why(make_bench: MakeBench, here: Path) -> None:
    bench = make_bench()
    assert bench.run("replay no.mlxfun").error == (
        "cannot read the replay file no.mlxfun: No such file or directory"
    )
    (here / "s.mlxfun").write_bytes(b"info\n\xff\xfe\n")
    assert bench.run("replay s.mlxfun").error == (
        "s.mlxfun:2: not UTF-8 text, so not a replay file"
    )


def test_quit_ends_a_replay_but_not_the_shell(make_bench: MakeBench, here: Path) -> None:
    (here / "s.mlxfun").write_text("load demo\nquit\nundo\n")
    bench = make_bench()
    ended = bench.run("replay s.mlxfun")
    assert isinstance(ended.report, ReplayReport)
    assert ended.report.commands == 1


def test_cancelling_a_replay_ends_all_of_it(make_bench: MakeBench, here: Path) -> None:
    (here / "s.mlxfun").write_text("load demo\ncollect --dataset demo:mixed\nprune --n-prune 1\n")
    bench = make_bench(gate=threading.Event())
    job = bench.engine.run("replay s.mlxfun")
    bench.until(lambda e: isinstance(e, RoutingFrame))
    bench.engine.cancel()
    ended = bench.end_of(job)
    assert ended.cancelled
    assert bench.sessions[0].plan is None


def test_the_file_being_recorded_cannot_be_replayed(bench: Bench, here: Path) -> None:
    bench.do("record s.mlxfun", "info")
    ended = bench.run("replay s.mlxfun")
    assert ended.error == ("s.mlxfun is being recorded to: it cannot be replayed at the same time")


def test_a_replay_can_itself_be_recorded(make_bench: MakeBench, recorded: Path, here: Path) -> None:
    bench = make_bench(seed=1)
    bench.engine.record(here / "again.mlxfun")
    bench.do("replay s.mlxfun")
    assert (here / "again.mlxfun").read_text() == recorded.read_text()


def test_a_recording_with_the_identity_of_an_earlier_version_is_compared_by_its_names(
    make_bench: MakeBench, recorded: Path
) -> None:
    text = recorded.read_text()
    text = text.replace("#: checkpoint ", "#: checkpoint earlier-")
    text = text.replace("#= state ", "#= state earlier-").replace(" staged ", " staged earlier-")
    recorded.write_text(text)
    bench = make_bench(seed=1)
    ended = bench.run("replay s.mlxfun")
    assert ended.error is None
    assert isinstance(ended.report, ReplayReport)
    assert ended.report.compared > 1
    said = [event.text for event in bench.events if isinstance(event, Notice)]
    assert any("made with the identity of an earlier version" in text for text in said)
    # What is recorded meanwhile, and what comes after, has the names of today.
    assert not any("earlier-" in line for line in bench.engine._bench.journal.lines)
    assert bench.engine._bench.recorded_name("x") == "x"


def test_absolute_paths_of_a_recording_are_laid_below_the_output_root(
    make_bench: Callable[..., Bench], here: Path
) -> None:
    place = here / "elsewhere"
    (here / "s.mlxfun").write_text(
        f"#: model demo\ncollect --dataset demo:mixed --max-samples 2\nexport report {place}/r.md\n"
    )
    root = here / "root"
    bench = make_bench(output_root=root)
    bench.do("replay s.mlxfun")
    assert not place.exists()
    laid = root / place.relative_to("/")
    assert [p.name for p in laid.iterdir()] == ["r.md"]
    assert Files(root, here).readable(place / "r.md") == laid / "r.md"  # and is read from there
    assert Files(root).readable(place / "r.md") == place / "r.md"
    assert "lies outside the output root" in (bench.run("export report ../x.md").error or "")
    assert "lies outside the output root" in (bench.run(f"export report {place}/x.md").error or "")
