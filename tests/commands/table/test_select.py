"""Picking by hand from the command line."""

from __future__ import annotations

import threading

import pytest

from commands.registry import parse
from mlxfun.errors import UsageError
from tests.commands.conftest import Bench


def test_select_stages_what_it_names(bench: Bench) -> None:
    ended = bench.run("select --drop 1:7,3:0..2")
    assert ended.report is not None
    assert ended.report.data()["pruned"] == {"1": [7], "3": [0, 1, 2], "5": []}


def test_select_without_a_change_says_what_it_wants(bench: Bench) -> None:
    ended = bench.run("select --metric freq")
    assert (ended.error or "").startswith("select: give --drop L:E, --keep L:E")


def test_a_threshold_is_a_share() -> None:
    assert parse("select --below 0.01").params["below"] == 0.01
    with pytest.raises(UsageError, match="--below"):
        parse("select --below 1.5")


def test_a_probe_needs_a_plan_and_is_not_recorded(bench: Bench, tmp_path) -> None:
    path = tmp_path / "s.mlxfun"
    error = bench.run("probe").error
    assert error == "nothing is staged to probe; stage a plan first, e.g. with prune"
    ended = bench.do(f"record {path}", "select --drop 1:7", "probe")[-1]
    assert ended.report is not None
    assert ended.report.data()["dataset"] == "held-out"
    text = path.read_text()
    assert "select --drop 1:7" in text
    assert "probe" not in text


def test_cancelling_one_line_only_leaves_others_alone() -> None:
    gate = threading.Event()
    bench = Bench(gate)
    try:
        bench.do("load demo")
        job = bench.engine.run("collect --dataset demo:mixed --max-samples 2")
        bench.until(lambda e: type(e).__name__ == "JobStarted" and e.job == job)  # type: ignore[attr-defined]
        bench.engine.cancel(only="probe --tokens 512")
        gate.set()
        assert bench.end_of(job).error is None
    finally:
        gate.set()
        bench.engine.close()


def test_ab_tells_where_the_answers_part(bench: Bench) -> None:
    assert "nothing to compare" in (bench.run("ab Hello").error or "")
    bench.do("select --drop 1:7")
    report = bench.do("ab --seed 3 -- -why not?")[0].report
    assert report is not None
    data = report.data()
    assert (data["prompt"], data["seed"]) == ("-why not?", 3)
    assert (data["first_divergence"], data["kl_mean"]) == (1, 0.25)
    assert data["candidate"]["text"] == "a c"


def test_questions_are_taken_back_and_asked_again(bench: Bench) -> None:
    error = bench.run("chat --back 1").error
    assert error == "the conversation has 0 questions to take back"
    bench.do("chat one", "chat two")
    report = bench.do("chat --back 1")[0].report
    assert report is not None
    assert report.data()["prompt"] == "what was asked"
    assert bench.sessions[0].turns == 2
    assert bench.run("chat --back 1 --candidate").error is not None
    assert bench.sessions[0].turns == 2  # as it was before it failed
    assert "leave out --back" in (bench.run("chat --new --back 1 x").error or "")


def test_summed_ranks_are_staged_or_written(bench: Bench, tmp_path) -> None:
    import numpy as np

    from mlxfun.calibration.routing_stats import SUMS, RoutingStats

    for name, order in (("a", range(8)), ("b", range(8))):
        sums = dict.fromkeys(SUMS, np.array([list(order)] * 3, float))
        RoutingStats(sums, (1, 3, 5), 1, 10).save(tmp_path / f"{name}.npz")
    files = f"{tmp_path / 'a.npz'} {tmp_path / 'b.npz'}"
    report = bench.do(f"stats rank {files} --n-prune 2 --stage --output {tmp_path / 'k.csv'}")[0]
    assert report.report is not None
    data = report.report.data()
    assert data["chosen"] == {"1": [0, 1], "3": [0, 1], "5": [0, 1]}
    assert data["staged"]
    plan = bench.sessions[0].plan
    assert plan is not None
    assert plan.pruned == {1: (0, 1), 3: (0, 1), 5: (0, 1)}
    assert (tmp_path / "k.csv").is_file()
    assert "say which experts to prune" in (bench.run(f"stats rank {files}").error or "")


def test_states_are_named_and_compared(bench: Bench) -> None:
    named = bench.do("name 0 as it came")[0].report
    assert named is not None
    assert named.data()["nodes"][0]["label"] == "as it came"
    bench.do("collect --dataset demo:mixed", "prune --n-prune 1", "apply")
    report = bench.do("compare 0 1 --dataset demo:eval")[0].report
    assert report is not None
    data = report.data()
    assert (data["a"]["perplexity"], data["b"]["perplexity"]) == (12.0, 13.0)
    assert data["datasets"] == ["demo:eval"]
    assert "(1.083x node 0's)" in report.summary()


def test_guardrails_that_were_set_count_for_apply_until_they_are_off(bench: Bench) -> None:
    bench.do("collect --dataset demo:mixed", "prune --n-prune 1")
    settings = bench.do("set max-kl 0.000001")[0].report
    assert settings is not None
    assert settings.data()["settings"]["max-kl"] == 0.000001
    assert "is above --max-kl 1e-06" in (bench.run("apply").error or "")
    bench.do("apply --max-kl 9", "undo")
    off = bench.do("set max-kl off")[0].report
    assert off is not None
    assert off.data()["settings"]["max-kl"] is None
    bench.do("prune --n-prune 1", "apply")
    assert "set: " in (bench.run("set max-kl 0").error or "")


def test_a_comparison_shows_names_as_they_are_in_a_narrow_panel() -> None:
    from rich.console import Console

    from commands.output.render.dispatch import render
    from mlxfun.evaluation.reports import CompareReport, NodeFigures

    a = NodeFigures(0, "load demo", "x", 6 << 20, 96, 1.0, 22.0, 1.0, 0.0, ())
    b = NodeFigures(1, "[b]small[/b]", "y", 5 << 20, 72, None, 33.0, 1.5, None, ())
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(render(CompareReport(a, b, 99, ("s",), {0: (3, 4)}, {})))
    assert [line.split() for line in capture.get().splitlines()[2:]] == [
        ["0", "load", "demo", "1", "[b]small[/b]"],
        ["perplexity", "22.000", "33.000"],
        ["x", "checkpoint", "1.000", "1.500"],
        ["KL", "0.0000"],
        ["size", "6.0", "MiB", "5.0", "MiB"],
        ["experts", "96", "72"],
        ["work", "kept", "100.0%"],
        ["only", "in", "0,", "layer", "0", "3", "4"],
    ]
