"""The engine: lines in, events out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxfun.calibration.reports import CollectReport
from mlxfun.editing.reports import PlanReport
from mlxfun.events import Event, JobEnded, JobStarted, Notice, RoutingFrame, Token
from mlxfun.generation.reports import ChatReport
from mlxfun.report import TextReport
from mlxfun.session.reports import InfoReport
from tests.commands.conftest import Bench

MakeBench = Callable[..., Bench]


def test_the_main_job_from_collect_to_redo(bench: Bench) -> None:
    ended = bench.do(
        "collect --dataset demo:mixed --max-samples 4",
        "prune --n-prune 4 --metric reap_sum",
        "preview --dataset demo:eval",
        "apply",
        "undo",
        "redo",
    )
    states = [e.state for e in ended]
    assert states[0] == states[1] == states[2] == states[4]
    assert states[3] == states[5] != states[0]
    plan = ended[1].report
    assert isinstance(plan, PlanReport)
    assert plan.state_after == states[3]


def test_the_view_is_fresh_before_the_end_of_a_job_is_announced(make_bench: MakeBench) -> None:
    bench = make_bench()
    seen: list[tuple[str, bool]] = []

    def listen(event: Event) -> None:
        if isinstance(event, JobEnded):
            view = bench.engine.view()
            seen.append((view.state, view.plan is not None))

    bench.engine.subscribe(listen)
    ended = bench.do("load demo", "collect --dataset demo:mixed", "prune --n-prune 1")
    assert seen == [(ended[0].state, False), (ended[0].state, False), (ended[0].state, True)]


def test_the_session_is_only_touched_on_the_worker_thread(bench: Bench) -> None:
    bench.do("info", "history", "collect --dataset demo:mixed")
    bench.engine.view()
    bench.engine.rows()
    bench.engine.complete("why 1:")
    threads = bench.sessions[0].threads
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_history_shows_the_line_that_was_typed(bench: Bench) -> None:
    bench.do("collect --dataset demo:mixed", "prune --n-prune 2", "apply --max-kl 0.5")
    assert bench.sessions[0].command == "apply --max-kl 0.5"


def test_a_command_without_a_model_says_how_to_load_one(make_bench: MakeBench) -> None:
    ended = make_bench().run("info")
    assert ended.error == "no model is loaded: type load PATH, or load demo"
    assert ended.state == ""


def test_a_line_that_does_not_parse_ends_at_once_even_while_the_worker_is_busy(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(gate=threading.Event())
    bench.do("load demo")
    bench.engine.run("collect --dataset demo:mixed")
    bench.until(lambda e: isinstance(e, JobStarted) and e.line.startswith("collect"))
    ended = bench.run("prun --n-prune 4")
    assert ended.usage
    assert ended.error == "unknown command 'prun': did you mean prune?; type help for a list"
    assert bench.engine.busy == "collect --dataset demo:mixed"


def test_help_answers_while_the_worker_is_busy(make_bench: MakeBench) -> None:
    bench = make_bench(gate=threading.Event())
    bench.do("load demo")
    bench.engine.run("collect --dataset demo:mixed")
    ended = bench.run("help prune")
    assert isinstance(ended.report, TextReport)
    assert "--n-prune" in ended.report.text


def test_cancelling_a_collect_keeps_what_was_collected(make_bench: MakeBench) -> None:
    bench = make_bench(gate=threading.Event())
    bench.do("load demo")
    job = bench.engine.run("collect --dataset demo:mixed --max-samples 30")
    bench.until(lambda e: isinstance(e, RoutingFrame))
    bench.engine.cancel()
    ended = bench.end_of(job)
    assert isinstance(ended.report, CollectReport)
    assert ended.report.cancelled
    assert ended.report.samples < 30


def test_tokens_and_frames_carry_the_number_of_their_job(bench: Bench) -> None:
    job = bench.engine.run("chat hello there")
    bench.end_of(job)
    tokens = [e for e in bench.events if isinstance(e, Token)]
    assert "".join(t.text for t in tokens) == "turn 0: hello there"
    assert {t.job for t in tokens} == {job}


def test_jobs_wait_in_line(make_bench: MakeBench) -> None:
    gate = threading.Event()
    bench = make_bench(gate=gate)
    bench.do("load demo")
    bench.engine.run("collect --dataset demo:mixed --max-samples 2")
    last = bench.engine.run("info")
    bench.until(lambda e: isinstance(e, JobStarted) and e.line.startswith("collect"))
    assert bench.engine.queue == ("info",)
    gate.set()
    assert isinstance(bench.end_of(last).report, InfoReport)


def test_a_listener_that_raises_disturbs_nobody(make_bench: MakeBench) -> None:
    bench = make_bench()

    def broken(event: Event) -> None:
        raise RuntimeError("screen gone")

    bench.engine.subscribe(broken)
    bench.do("load demo", "info")


def test_loading_another_model_closes_the_first(bench: Bench) -> None:
    bench.do("load other")
    assert [s.closed for s in bench.sessions] == [True, False]


def test_a_model_that_cannot_be_loaded_leaves_the_resident_one(bench: Bench) -> None:
    ended = bench.run("load /no/such/model")
    assert ended.error == "/no/such/model is neither a directory nor a model on the Hub"
    assert not bench.sessions[0].closed
    bench.do("info")


def test_drop_frees_the_resident_model_before_loading(bench: Bench) -> None:
    bench.run("load /no/such/model --drop")
    assert bench.sessions[0].closed
    assert bench.run("info").error == "no model is loaded: type load PATH, or load demo"


def test_closing_the_engine_closes_the_session(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.do("load demo")
    bench.engine.close()
    assert bench.sessions[0].closed


def test_set_changes_the_defaults_of_later_commands(bench: Bench) -> None:
    bench.do("set dataset demo:python", "set max-tokens 3")
    collected, chatted = bench.do("collect", "chat a b c d e f")
    assert isinstance(collected.report, CollectReport)
    assert collected.report.dataset == "demo:python"
    assert isinstance(chatted.report, ChatReport)
    assert chatted.report.text == "turn 0: a"


def test_collect_remembers_the_last_data_set(bench: Bench) -> None:
    missing = bench.run("collect")
    assert missing.usage
    assert missing.error == "which data set? Give --dataset PATH, or --dataset demo:mixed"
    bench.do("collect --dataset demo:solidity")
    (ended,) = bench.do("collect")
    assert isinstance(ended.report, CollectReport)
    assert ended.report.dataset == "demo:solidity"


def remembered(bench: Bench) -> str | None:
    report = bench.do("set")[0].report
    assert report is not None
    name: str | None = report.data()["settings"]["dataset"]
    return name


@pytest.mark.parametrize("command", ["collect", "merge --n-prune 1", "bake"])
def test_a_mistyped_data_set_is_not_remembered(bench: Bench, tmp_path: Path, command: str) -> None:
    bench.do("steer --activate 1:2")
    bench.run(f"{command} --dataset {tmp_path}/nofile.jsonl")
    assert remembered(bench) is None
    bench.do("collect --dataset demo:solidity")
    bench.run(f"{command} --dataset {tmp_path}/nofile.jsonl")
    assert remembered(bench) == "demo:solidity"
    bench.do(f"{command} --dataset demo:python")
    assert remembered(bench) == "demo:python"


def test_a_data_set_that_could_be_read_is_remembered_whatever_else_fails(bench: Bench) -> None:
    assert "leaves" in (bench.run("merge --n-prune 99 --dataset demo:python").error or "")
    assert remembered(bench) == "demo:python"


def test_chat_takes_text_as_it_is(bench: Bench) -> None:
    for line, prompt in (
        ("chat what's up?", "what's up?"),
        ("chat -5 + 3", "-5 + 3"),
        ("chat '-5 +  3'", "-5 +  3"),
        ("chat --temperature 0.5 [bold]hi[/] --new", "[bold]hi[/] --new"),
        ("chat -- --new", "--new"),
        ("chat --system 'be brief' # 1", "# 1"),
    ):
        (ended,) = bench.do(line)
        assert isinstance(ended.report, ChatReport)
        assert ended.report.prompt == prompt


def test_chat_new_starts_over(bench: Bench) -> None:
    first, _, again = bench.do("chat a", "chat b", "chat --new c")
    assert isinstance(first.report, ChatReport)
    assert isinstance(again.report, ChatReport)
    assert (first.report.text, again.report.text) == ("turn 0: a", "turn 0: c")


def test_outputs_stay_below_the_output_root(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench(output_root=tmp_path / "root")
    bench.do("load demo", "save out")
    assert (tmp_path / "root" / "out" / "config.json").is_file()
    for path in ("../out", str(tmp_path / "elsewhere"), "."):
        ended = bench.run(f"save {path}")
        assert ended.usage
        assert ended.error is not None
        assert ended.error.startswith(f"{path} lies outside the output root")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root"]


def test_counting_chat_may_save_after_every_answer(bench: Bench, tmp_path: Path) -> None:
    bench.do(f"stats count on --auto-save {tmp_path}/s.npz")
    assert bench.sessions[0].auto_save == tmp_path / "s.npz"
    assert bench.engine.view().counting
    ended = bench.run(f"stats count off --auto-save {tmp_path}/s.npz")
    assert ended.error == "stats count: --auto-save needs on"
    bench.do("stats count off")
    assert not bench.engine.view().counting


def test_a_model_left_aside_by_a_killed_save_is_offered_and_put_back(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.mlxfun-bak").mkdir()
    (tmp_path / "out.mlxfun-bak" / "config.json").write_text("whole")
    bench = make_bench()
    ended = bench.run("load ./out")
    assert ended.error is not None
    (notice,) = [e for e in bench.events if isinstance(e, Notice)]
    assert notice.text == (
        "out.mlxfun-bak is a whole model that a save was replacing when it was cut short"
    )
    (ended,) = bench.do("recover")
    assert ended.report == TextReport("put back out")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"
    assert bench.run("recover").error == f"nothing to recover in {tmp_path}"
    bench.do("load ./out")


def test_set_refuses_what_the_option_would_refuse(bench: Bench) -> None:
    for line, message in (
        ("set temperature hot", "set: invalid value for '[VALUE]': 'hot' is not a valid number"),
        ("set max-tokens 0", "set: invalid value for '[VALUE]': 0 is not in the range x>=1"),
        ("set seed", "set: give the value too: set seed VALUE"),
        ("set colour red", "set: invalid value for '[NAME]': 'colour' is not one of 'seed'"),
    ):
        ended = bench.run(line)
        assert ended.usage
        assert ended.error is not None
        assert ended.error.startswith(message)
    (ended,) = bench.do("set")
    assert ended.report is not None
    assert ended.report.data()["settings"]["max-tokens"] == 256
