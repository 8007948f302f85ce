"""From event to next state, without a screen."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest

from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Notice,
    Progress,
    ResidencyFrame,
    RoutingFrame,
    Token,
)
from mlxfun.generation.reports import ChatReport
from mlxfun.report import TextReport
from mlxfun.session.reports import HeatView, SessionView
from tui.input.chat_actions import line_for
from tui.state.app_state import AppState, Entry
from tui.state.chat_turns import asked_of
from tui.state.reducer import add_traffic, reduce, speed


def after(*events: Event, state: AppState | None = None, now: float = 0.0) -> AppState:
    state = state or AppState()
    for event in events:
        state = reduce(state, event, now)
    return state


def heat(layers: int = 2, experts: int = 4) -> HeatView:
    no = np.zeros((layers, experts), bool)
    return HeatView(tuple(range(layers)), experts, {}, ~no, no, no, no, no, samples=0, tokens=0)


def token(index: int, text: str, experts: list[list[int]] | None = None) -> Token:
    chosen = None if experts is None else np.array(experts, np.int32)
    return Token(1, "base", index, index, text, chosen)


def test_a_job_waits_runs_and_is_gone() -> None:
    state = after(JobQueued(1, "info"), JobQueued(2, "layers"))
    assert state.queued == ((1, "info"), (2, "layers"))
    state = after(JobStarted(1, "info"), state=state, now=5.0)
    assert state.queued == ((2, "layers"),)
    assert state.job is not None
    assert (state.job.line, state.job.started) == ("info", 5.0)
    state = after(JobEnded(1, "info", TextReport("fine"), None, 0.1, ""), state=state)
    assert state.job is None
    assert state.echo == Entry("ok", "info", "fine", TextReport("fine"), 0.1)


def test_a_line_that_never_started_leaves_the_queue_and_the_running_job_alone() -> None:
    state = after(
        JobQueued(1, "collect"),
        JobStarted(1, "collect"),
        JobQueued(2, "clapply"),
        JobEnded(2, "clapply", None, "no such command", 0.0, "", usage=True),
    )
    assert state.queued == ()
    assert state.job is not None
    assert state.job.line == "collect"
    assert state.echo is not None
    assert (state.echo.level, state.echo.text) == ("error", "no such command")


def test_a_replay_runs_its_lines_inside_itself() -> None:
    state = after(JobQueued(1, "replay s"), JobStarted(1, "replay s"), JobStarted(2, "chat hi"))
    assert state.job is not None
    assert state.job.line == "chat hi"
    assert [turn.prompt for turn in state.turns] == ["hi"]
    state = after(JobEnded(2, "chat hi", TextReport("x"), None, 0.1, ""), state=state)
    assert state.job is not None
    assert state.job.line == "replay s"
    state = after(JobEnded(1, "replay s", TextReport("x"), None, 0.1, ""), state=state)
    assert state.job is None


def test_progress_of_another_job_is_ignored() -> None:
    state = after(JobStarted(1, "collect"), Progress(9, "x", 1, 2, "", 1.0))
    assert state.job is not None
    assert state.job.progress is None


def test_where_experts_are_is_told_as_long_as_the_job_runs() -> None:
    held = np.array([[0, 2]], np.int8)
    state = after(JobStarted(1, "chat hi"), ResidencyFrame(1, held))
    assert state.held is held
    state = after(JobEnded(1, "chat hi", TextReport("fine"), None, 0.1, ""), state=state)
    assert state.held is None  # the view says it now


def test_a_frame_lives_as_long_as_its_job() -> None:
    frame = RoutingFrame(1, np.ones((1, 2), np.int64), np.ones((1, 2)), 3, 30)
    state = after(JobStarted(1, "collect"), frame)
    assert state.frame is frame
    assert after(JobEnded(1, "collect", None, "x", 0.0, ""), state=state).frame is None


def test_a_cancel_is_told_apart_from_an_error() -> None:
    state = after(JobEnded(1, "collect", None, "cancelled", 1.0, "", cancelled=True))
    assert state.echo is not None
    assert state.echo.level == "info"


def test_a_notice_is_logged_with_its_level() -> None:
    state = after(Notice("warning", "statistics are stale"))
    assert state.log == (Entry("warning", "", "statistics are stale"),)


def test_tokens_grow_the_answer_and_the_report_settles_it() -> None:
    state = after(JobQueued(1, "chat 'hi there'"), JobStarted(1, "chat 'hi there'"), token(0, "He"))
    state = after(token(1, "llo"), state=state)
    assert [(t.prompt, t.text, t.done) for t in state.turns] == [("hi there", "Hello", False)]
    report = ChatReport("hi there", "Hello.", "candidate", 3, 0, 2, 9.0, "length")
    state = after(JobEnded(1, "chat 'hi there'", report, None, 1.0, ""), state=state)
    turn = state.turns[0]
    assert (turn.text, turn.side, turn.done, turn.note) == (
        "Hello.",
        "candidate",
        True,
        "cut off at --max-tokens",
    )


def test_a_stopped_answer_keeps_what_was_said() -> None:
    state = after(JobQueued(1, "chat hi"), JobStarted(1, "chat hi"), token(0, "Well"))
    state = after(JobEnded(1, "chat hi", None, "cancelled", 1.0, "", cancelled=True), state=state)
    turn = state.turns[0]
    assert (turn.text, turn.note, turn.done) == ("Well", "stopped", True)


def test_routing_of_an_answer_is_counted_and_its_newest_token_lit() -> None:
    state = AppState(view=SessionView(heat=heat()))
    state = after(JobQueued(1, "chat a"), JobStarted(1, "chat a"), state=state)
    state = after(token(0, "x", [[0, 1], [3, -1]]), token(1, "y", [[0, 2], [3, 2]]), state=state)
    assert state.traffic is not None
    assert state.traffic.tolist() == [[2, 1, 1, 0], [0, 0, 1, 2]]
    assert state.lit is not None
    assert state.lit.tolist() == [[0, 2], [3, 2]]
    ended = after(JobEnded(1, "chat a", None, "x", 1.0, ""), state=state)
    assert ended.lit is None
    assert ended.traffic is not None


def test_the_next_answer_counts_from_nought() -> None:
    state = AppState(view=SessionView(heat=heat(1, 2)), traffic=np.array([[7.0, 7.0]]))
    state = after(JobQueued(1, "chat a"), token(0, "x", [[1]]), state=state)
    assert state.traffic is not None
    assert state.traffic.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("line", "error", "kept"),
    [("load demo", None, False), ("load gone", "no such directory", True), ("load", None, True)],
)
def test_another_model_begins_with_an_empty_map(line: str, error: str | None, kept: bool) -> None:
    state = AppState(view=SessionView(heat=heat(1, 2)), traffic=np.array([[7.0, 7.0]]))
    state = replace(state, heat=replace(state.heat, metric="answer"))
    ended = after(JobEnded(1, line, None, error, 0.1, "0", False), state=state)
    assert (ended.traffic is not None) == kept
    assert ended.heat.metric == ("answer" if kept else None)


def test_traffic_never_changes_an_array_that_a_frame_may_still_show() -> None:
    before = np.zeros((1, 2))
    after_ = add_traffic(before, np.array([[0]], np.int32), 2)
    assert before.tolist() == [[0, 0]]
    assert after_.tolist() == [[1, 0]]


def test_speed_counts_from_the_first_token() -> None:
    state = after(JobQueued(1, "chat a"), JobStarted(1, "chat a"))
    for index in range(5):
        state = reduce(state, token(index, "x"), now=10.0 + index * 0.5)
    assert speed(state, now=12.0) == pytest.approx(2.0)
    assert speed(AppState(), now=1.0) is None


def test_the_last_successful_line_of_a_command_is_remembered() -> None:
    state = after(
        JobEnded(1, "collect --dataset a", TextReport("ok"), None, 1, ""),
        JobEnded(2, "collect --dataset b", None, "failed", 1, ""),
        JobEnded(3, "info", TextReport("ok"), None, 1, ""),
    )
    assert state.last_line("collect") == "collect --dataset a"
    assert state.last_line("prune") is None


@pytest.mark.parametrize(
    "text",
    ["plain", "two words", "it's", '"quoted"', "--n-prune 4", "-", "a; b | c $(d)", "ünï [b]"],
)
def test_whatever_is_said_arrives_word_for_word(text: str) -> None:
    line = line_for(AppState(), text)
    words = shlex.split(line)
    assert words[0] == "chat"
    assert words[-1] == text
    asked = asked_of(line)
    assert asked is not None
    assert asked.text == text


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("chat --temperature 0.5 hello you", "hello you"),
        ("chat --new hello", "hello"),
        ("chat --new", None),
        ("chat --system='be kind' hi", "hi"),
        ("chat", None),
        ("chat it's", "it's"),
    ],
)
def test_the_prompt_is_found_behind_the_options(line: str, prompt: str | None) -> None:
    asked = asked_of(line)
    assert asked is not None
    assert asked.text == prompt


def test_a_line_of_another_command_asks_nothing() -> None:
    assert asked_of("collect --dataset x") is None


def test_the_log_is_bounded() -> None:
    state = AppState()
    for number in range(500):
        state = reduce(state, Notice("info", str(number)), 0.0)
    assert len(state.log) == 200
    assert state.log[-1].text == "499"
    assert replace(state).log is state.log


def test_a_question_says_what_it_waits_for_until_it_runs() -> None:
    collect = (JobQueued(1, "collect"), JobStarted(1, "collect"))
    state = after(*collect, JobQueued(2, "chat hello"))
    assert state.turns[-1].waits == "waits until collect has ended"
    state = after(
        JobEnded(1, "collect", None, "x", 0.0, ""), JobStarted(2, "chat hello"), state=state
    )
    assert state.turns[-1].waits == ""
    cancelled = after(*collect, JobQueued(2, "chat hello"),
                      JobEnded(2, "chat hello", None, "cancelled", 0.0, "", True))  # fmt: skip
    assert cancelled.turns[-1].waits == ""
