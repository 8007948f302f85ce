"""What was done in the middle of an answer, and answers that were cancelled, in session files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxfun.events import Event, JobEnded, JobStarted, Notice, Progress, Token
from tests.commands.conftest import Bench, body
from tests.commands.scripts.test_resume import crashed
from tests.commands.stub_session import StubSession

MakeBench = Callable[..., Bench]
CHAT = "chat one two three four five"
STEER = "steer --activate 3:5"


@pytest.fixture
def folder(here: Path) -> Path:
    return here / "sessions"


def at_token(bench: Bench, index: int, act: Callable[[], object]) -> None:
    """Do something once, when the answer's token `index` has been generated."""
    left = [act]

    def listen(event: Event) -> None:
        if isinstance(event, Token) and event.index == index and left:
            left.pop()()

    bench.engine.subscribe(listen)


def steered_in_the_middle(bench: Bench) -> None:
    at_token(bench, 2, lambda: bench.engine.run(STEER))
    bench.do("load demo", CHAT)
    bench.do("info")


def order(bench: Bench) -> list[str]:
    """Tokens and command lines in the order in which they came."""
    out = []
    for event in bench.events:
        if isinstance(event, Token):
            out.append(event.text.strip())
        elif isinstance(event, JobStarted) and not event.line.startswith(("load", "replay")):
            out.append(event.line)
    return out


def test_a_steer_in_mid_answer_is_replayed_after_the_same_token(
    make_bench: MakeBench, here: Path
) -> None:
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    steered_in_the_middle(bench)
    lines = body(here / "s.mlxfun")
    at = lines.index(STEER)
    assert lines[at - 1] == "#~ after 3 tokens of the answer above"
    before = order(bench)
    assert before[:5] == [CHAT, "turn", "0:", "one", STEER]
    again = make_bench()
    again.do("replay s.mlxfun")
    assert order(again) == before
    assert again.sessions[0].steered == bench.sessions[0].steered
    assert again.sessions[0].steered is not None


def test_a_step_made_in_mid_answer_has_its_own_name_in_the_history(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    steer = StubSession.steer

    def noted(session: StubSession, *given: Any, **more: Any) -> Any:
        names.append(session.command)
        return steer(session, *given, **more)

    monkeypatch.setattr(StubSession, "steer", noted)
    bench = make_bench()
    at_token(bench, 2, lambda: bench.engine.run(STEER))
    bench.do("load demo", CHAT)
    assert names == [STEER]
    assert bench.sessions[0].command == CHAT


def test_an_answer_that_is_too_short_now_says_so_and_the_state_is_as_recorded(
    make_bench: MakeBench, here: Path
) -> None:
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    steered_in_the_middle(bench)
    text = (here / "s.mlxfun").read_text()
    (here / "s.mlxfun").write_text(text.replace("after 3 tokens", "after 300 tokens"))
    again = make_bench()
    again.do("replay s.mlxfun")
    said = [e.text for e in again.events if isinstance(e, Notice) and e.level == "warning"]
    assert any("ended before its token 300" in text for text in said), said
    assert again.sessions[0].steered == bench.sessions[0].steered


def test_a_cancelled_answer_is_not_repeated(make_bench: MakeBench, here: Path) -> None:
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo")
    at_token(bench, 1, bench.engine.cancel)
    (ended,) = bench.do(CHAT)
    assert ended.report is not None
    assert ended.report.data()["finish_reason"] == "cancelled"
    bench.do("info")
    assert body(here / "s.mlxfun")[0] == f"# cancelled: {CHAT}"
    again = make_bench()
    again.do("replay s.mlxfun")
    assert order(again) == ["info"]


def test_a_steer_in_an_answer_that_was_cancelled_stays_in_force(
    make_bench: MakeBench, here: Path
) -> None:
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    at_token(bench, 1, lambda: bench.engine.run(STEER))
    at_token(bench, 3, bench.engine.cancel)
    bench.do("load demo", CHAT, "info")
    again = make_bench()
    again.do("replay s.mlxfun")
    assert order(again) == [STEER, "info"]
    assert again.sessions[0].steered == bench.sessions[0].steered
    assert again.sessions[0].steered is not None


def test_a_new_conversation_whose_first_question_was_cancelled_did_not_begin(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.do("load demo", "chat a", "chat b")
    at_token(bench, 1, bench.engine.cancel)
    bench.do("chat --new c d e")
    assert bench.sessions[0].turns == 2


def test_a_resumed_session_says_which_command_runs_and_what_it_leaves_out(
    make_bench: MakeBench,
    folder: Path,
) -> None:
    crashed(
        make_bench, folder, "collect --dataset demo:mixed --max-samples 2", "stats save s.npz",
        "prune --n-prune 2",
    )  # fmt: skip
    bench = make_bench()
    bench.engine.keep(folder)
    (ended,) = bench.do("resume")
    steps = [e.label for e in bench.events if isinstance(e, Progress) and "command" in e.label]
    assert steps == ["command 1 of 3", "command 2 of 3", "command 3 of 3"]
    assert ended.report is not None
    assert ended.report.summary() == (
        "the session is back: 2 commands were run again; not repeated, since they change "
        "neither model nor statistics: 1 command (stats save)"
    )


def test_a_session_on_another_model_replaces_one_on_which_nothing_was_done(
    make_bench: MakeBench,
    folder: Path,
) -> None:
    crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2", "prune --n-prune 2")
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("load other", "resume")
    assert bench.engine.view().plan is not None
    ended = [e for e in bench.events if isinstance(e, JobEnded) and e.line == "load demo"]
    assert len(ended) == 1


def test_a_session_of_this_directory_is_offered_before_a_newer_one_of_another(
    make_bench: MakeBench,
    folder: Path,
) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    other = path.with_stem("z-newer")
    other.write_text(path.read_text().replace(str(folder.parent), "/some/where"))
    bench = make_bench()
    bench.engine.keep(folder)
    bench.engine.offer()
    bench.engine.offer()
    bench.do("load demo")
    offers = [e for e in bench.events if isinstance(e, Notice) and e.level == "offer"]
    assert [(e.line, "of gone on demo" in e.text) for e in offers] == [("resume", True)], "once"


def test_a_session_of_another_directory_is_offered_there(
    make_bench: MakeBench,
    folder: Path,
) -> None:
    path = crashed(make_bench, folder, "collect --dataset demo:mixed --max-samples 2")
    path.write_text(path.read_text().replace(str(folder.parent), "/some/where"))
    bench = make_bench()
    bench.engine.keep(folder)
    bench.do("load demo")
    (offer,) = (e for e in bench.events if isinstance(e, Notice) and e.level == "offer")
    assert offer.text.endswith("start mlxfun-shell --resume in /some/where to resume it")
    assert offer.line == ""
