"""An engine on a stub session, and a listener that waits for jobs to end."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from commands.engine import Engine
from mlxfun.events import Event, JobEnded
from tests.commands.stub_session import StubSession


class Bench:
    """An engine with everything it emitted, and the sessions it opened."""

    def __init__(self, gate: threading.Event | None = None, **options: Any) -> None:
        self.gate = gate
        self.sessions: list[StubSession] = []
        self.events: list[Event] = []
        self._arrived: SimpleQueue[Event] = SimpleQueue()
        self.engine = Engine(session_class=lambda _: SimpleNamespace(open=self._open), **options)
        self.engine.subscribe(self._arrived.put)

    def _open(
        self, source: str | Path, _options: Any = None, *, seed: int, **_: Any
    ) -> StubSession:
        session = StubSession(source, seed, self.gate)
        self.sessions.append(session)
        return session

    def next_event(self) -> Event:
        try:
            event = self._arrived.get(timeout=10)
        except Empty:
            raise AssertionError("no event within 10 seconds") from None
        self.events.append(event)
        return event

    def until(self, wanted: Callable[[Event], bool]) -> Event:
        while not wanted(event := self.next_event()):
            pass
        return event

    def end_of(self, job: int) -> JobEnded:
        event = self.until(lambda e: isinstance(e, JobEnded) and e.job == job)
        assert isinstance(event, JobEnded)
        return event

    def run(self, line: str) -> JobEnded:
        return self.end_of(self.engine.run(line))

    def do(self, *lines: str) -> list[JobEnded]:
        """Run lines that must succeed."""
        ended = [self.run(line) for line in lines]
        assert [e.error for e in ended] == [None] * len(lines)
        return ended


@pytest.fixture(autouse=True)
def temporary_directories_go_away(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays make temporary directories and leave what was saved in them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.engine.close()
        assert not bench.engine.alive


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """An engine with the stub model loaded."""
    bench = make_bench()
    bench.do("load demo")
    return bench


SESSION = (
    "collect --dataset demo:mixed --max-samples 4",
    "prune --n-prune 4 --metric reap_sum",
    "preview --dataset demo:eval",
    "expect perplexity.all <= 16",
    "apply",
    "undo",
    "redo",
    "save out",
)
"""A session with everything that a recording can hold."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded(make_bench: Callable[..., Bench], here: Path) -> Path:
    """A session file with everything in `SESSION`."""
    bench = make_bench(seed=1)
    bench.engine.record(here / "s.mlxfun")
    bench.do("load demo", *SESSION)
    return here / "s.mlxfun"


def body(path: Path) -> list[str]:
    return [x for x in path.read_text().splitlines() if not x.startswith(("#:", "#!"))]
