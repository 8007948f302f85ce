"""What goes on between jobs: it takes its steps, gives way to jobs, and is settled before edits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from mlxfun.context import Context
from mlxfun.errors import Cancelled
from mlxfun.events import Event, JobEnded
from mlxfun.report import Report, TextReport
from mlxfun.session.worker import Worker


class Steps:
    """A background with so many steps to take. log: what happened, in order."""

    def __init__(self) -> None:
        self.left = 0
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.idle = threading.Event()
        self.cancelled = False

    def step(self, borrowed: bool) -> bool:
        self.threads.add(threading.get_ident())
        if self.left:
            self.left -= 1
            self.log.append("borrowed" if borrowed else "step")
        if not self.left:
            self.idle.set()
        return self.left > 0

    def settle(self, ctx: Context) -> None:
        self.log.append("settle")
        if self.cancelled:
            raise Cancelled("cancelled")
        self.left = 0

    def close(self) -> None:
        self.log.append("close")


class Shell:
    def __init__(self) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.worker = Worker(self.events.put)
        self.steps = Steps()
        self.worker.attach(self.steps)

    def run(self, name: str, **traits: bool) -> JobEnded:
        def work(ctx: Context) -> Report:
            self.steps.log.append(name)
            return TextReport(name)

        job = self.worker.submit(name, work, **traits)
        return self.until(job)

    def until(self, job: int) -> JobEnded:
        while True:
            event = self.events.get(timeout=10)
            if isinstance(event, JobEnded) and event.job == job:
                return event

    def work(self, steps: int) -> None:
        self.steps.idle.clear()
        self.steps.left = steps
        self.worker.wake()


@pytest.fixture
def shell() -> Iterator[Shell]:
    found = Shell()
    yield found
    found.worker.close()


def test_steps_are_taken_on_the_workers_thread_until_there_are_none_left(shell: Shell) -> None:
    shell.work(5)
    assert shell.steps.idle.wait(10)
    assert shell.steps.log == ["step"] * 5
    assert len(shell.steps.threads) == 1
    assert threading.get_ident() not in shell.steps.threads


def test_a_job_need_not_wait_for_the_last_step(shell: Shell) -> None:
    shell.work(10**9)
    assert shell.run("look", steady=True).error is None
    assert "settle" not in shell.steps.log
    assert shell.steps.left > 0
    shell.steps.left = 0


def test_what_goes_on_is_settled_before_a_job_that_may_change_the_model(shell: Shell) -> None:
    shell.work(10**9)
    shell.run("edit")
    assert shell.steps.log[-2:] == ["settle", "edit"]


def test_a_job_that_is_cancelled_meanwhile_does_not_run(shell: Shell) -> None:
    shell.steps.cancelled = True
    ended = shell.run("edit")
    assert ended.cancelled
    assert "edit" not in shell.steps.log


def test_steps_are_taken_between_the_tokens_of_a_job(shell: Shell) -> None:
    def chat(ctx: Context) -> Report:
        for token in range(3):
            shell.steps.log.append(f"token {token}")
            ctx.interlude()
        return TextReport("said")

    shell.steps.left = 2
    shell.until(shell.worker.submit("chat", chat, steady=True))
    taken = [entry for entry in shell.steps.log if entry != "step"]
    assert taken[:1] == ["token 0"]
    assert all(entry == "borrowed" for entry in taken if not entry.startswith("token"))


def test_a_nested_edit_is_settled_too(shell: Shell) -> None:
    def replay(ctx: Context) -> Report:
        def edit(_ctx: Context) -> Report:
            shell.steps.log.append("edit")
            return TextReport("edited")

        ctx.interlude()
        shell.worker.nested("edit", edit, ctx)
        return TextReport("replayed")

    shell.until(shell.worker.submit("replay", replay))
    assert shell.steps.log[-2:] == ["settle", "edit"]


def test_it_is_closed_before_the_session(shell: Shell) -> None:
    shell.worker.close()
    assert shell.steps.log[-1] == "close"
