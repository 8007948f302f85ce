"""The worker: one thread, jobs in order, cancel, and errors that become events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import numpy as np
import pytest

from mlxfun.context import Context
from mlxfun.errors import PlanError, UsageError
from mlxfun.events import Event, JobEnded, JobQueued, JobStarted, Progress, RoutingFrame, Token
from mlxfun.report import Report, TextReport
from mlxfun.session.worker import JobContext, Worker


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self._queue: SimpleQueue[Event] = SimpleQueue()

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def until_end(self, job: int) -> JobEnded:
        while True:
            event = self._queue.get(timeout=10)
            self.events.append(event)
            if isinstance(event, JobEnded) and event.job == job:
                return event


def say(text: str) -> Callable[[Context], Report]:
    return lambda ctx: TextReport(text)


def wait_until_cancelled(ctx: Context) -> Report:
    while True:
        ctx.check()
        time.sleep(0.002)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def worker(listener: Listener) -> Iterator[Worker]:
    worker = Worker(listener, after=lambda: "abc123")
    yield worker
    worker.close()


def test_a_job_is_queued_started_and_ended_in_that_order(
    worker: Worker, listener: Listener
) -> None:
    job = worker.submit("info", say("hello"))
    ended = listener.until_end(job)
    assert listener.events[:2] == [JobQueued(job, "info"), JobStarted(job, "info")]
    assert (ended.report, ended.error, ended.state) == (TextReport("hello"), None, "abc123")


def test_all_jobs_run_on_one_thread_which_is_not_the_callers(
    worker: Worker, listener: Listener
) -> None:
    seen = []

    def work(ctx: Context) -> Report:
        seen.append(threading.get_ident())
        return TextReport("")

    for _ in range(3):
        listener.until_end(worker.submit("x", work))
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


def test_an_engine_error_is_shown_as_it_is(worker: Worker, listener: Listener) -> None:
    def work(ctx: Context) -> Report:
        raise PlanError("--n-prune 9 leaves fewer than top-2")

    ended = listener.until_end(worker.submit("prune", work))
    assert ended.error == "--n-prune 9 leaves fewer than top-2"
    assert not ended.usage
    assert not ended.cancelled


def test_a_usage_error_is_marked_as_one(worker: Worker, listener: Listener) -> None:
    def work(ctx: Context) -> Report:
        raise UsageError("no")

    assert listener.until_end(worker.submit("prune", work)).usage


def test_an_unexpected_error_names_its_type_and_the_worker_lives_on(
    worker: Worker, listener: Listener
) -> None:
    def work(ctx: Context) -> Report:
        raise ZeroDivisionError("division by zero")

    ended = listener.until_end(worker.submit("bad", work))
    assert ended.error == "unexpected ZeroDivisionError: division by zero"
    assert listener.until_end(worker.submit("good", say("ok"))).report == TextReport("ok")


def test_a_library_that_calls_sys_exit_does_not_end_the_worker(
    worker: Worker, listener: Listener
) -> None:
    def work(ctx: Context) -> Report:
        raise SystemExit(3)

    assert listener.until_end(worker.submit("bad", work)).error == "unexpected SystemExit: 3"
    assert listener.until_end(worker.submit("good", say("ok"))).report == TextReport("ok")


def test_cancel_ends_the_running_job_and_leaves_the_waiting_one(
    worker: Worker, listener: Listener
) -> None:
    first = worker.submit("collect", wait_until_cancelled)
    second = worker.submit("info", say("second"))
    worker.cancel()
    ended = listener.until_end(first)
    assert ended.cancelled
    assert ended.error == "cancelled"
    assert listener.until_end(second).report == TextReport("second")


def test_a_second_cancel_drops_the_waiting_jobs_too(worker: Worker, listener: Listener) -> None:
    go = threading.Event()
    started = threading.Event()

    def stubborn(ctx: Context) -> Report:
        started.set()
        go.wait(10)
        ctx.check()
        return TextReport("never")

    first = worker.submit("collect", stubborn)
    second = worker.submit("info", say("second"))
    assert started.wait(10)
    assert (worker.busy, worker.queue) == ("collect", ("info",))
    worker.cancel()
    worker.cancel()
    assert worker.queue == ()
    go.set()
    assert listener.until_end(first).cancelled
    assert listener.until_end(second).cancelled
    assert JobStarted(second, "info") not in listener.events


def test_cancel_without_a_job_does_not_hit_the_next_one(worker: Worker, listener: Listener) -> None:
    worker.cancel()
    assert listener.until_end(worker.submit("info", say("ok"))).error is None


def test_the_worker_is_free_when_the_end_of_a_job_is_announced() -> None:
    busy: list[str | None] = []
    done = threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, JobEnded):
            busy.append(worker.busy)
            done.set()

    worker = Worker(listen)
    worker.submit("info", say(""))
    assert done.wait(10)
    worker.close()
    assert busy == [None]


def test_a_nested_job_has_its_own_events_and_the_cancel_of_its_parent(
    worker: Worker, listener: Listener
) -> None:
    inner: list[JobEnded] = []

    def outer(ctx: Context) -> Report:
        inner.append(worker.nested("a", say("A"), ctx))
        worker.cancel()
        inner.append(worker.nested("b", say("B"), ctx))
        return TextReport("done")

    listener.until_end(worker.submit("replay", outer))
    assert [e.cancelled for e in inner] == [False, True]
    assert [e.line for e in listener.events if isinstance(e, JobEnded)] == ["a", "b", "replay"]


def test_close_cancels_what_runs_and_finishes_on_the_worker_thread() -> None:
    threads: list[int] = []
    ended: list[Event] = []
    worker = Worker(ended.append, finish=lambda: threads.append(threading.get_ident()))
    worker.submit("collect", wait_until_cancelled)
    worker.submit("info", say("never"))
    assert worker.close(10)
    assert [e.cancelled for e in ended if isinstance(e, JobEnded)] == [True, True]
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_close_gives_up_after_its_timeout_on_a_job_that_cannot_be_cancelled() -> None:
    started, release = threading.Event(), threading.Event()

    def stuck(ctx: Context) -> Report:
        started.set()
        release.wait(10)
        return TextReport("")

    worker = Worker(lambda event: None)
    worker.submit("load", stuck)
    assert started.wait(10)
    began = time.monotonic()
    assert not worker.close(0.05)
    assert time.monotonic() - began < 2
    release.set()
    assert worker.close(10)


def test_a_job_after_close_is_refused_with_a_sentence() -> None:
    events: list[Event] = []
    worker = Worker(events.append)
    worker.close()
    worker.submit("info", say(""))
    assert isinstance(events[-1], JobEnded)
    assert events[-1].error == "the session is closing: nothing new is started"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_sent_fifteen_times_a_second_and_the_last_always() -> None:
    clock, sent = Clock(), []
    context = JobContext(7, threading.Event(), sent.append, clock)
    for done in range(1, 1001):  # one second, a thousand calls
        clock.now = done / 1000
        context.progress("collect", done, 1000, "samples")
    assert 14 <= len(sent) <= 17
    assert sent[0] == Progress(7, "collect", 1, 1000, "samples", 0.0)
    assert sent[-1] == Progress(7, "collect", 1000, 1000, "samples", pytest.approx(0.999))


def test_progress_held_back_is_sent_when_the_next_step_begins() -> None:
    clock, sent = Clock(), []
    context = JobContext(1, threading.Event(), sent.append, clock)
    context.progress("load", 1, None, "files")
    context.progress("load", 5, None, "files")
    context.progress("check", 0, 3, "layers")
    assert [(p.label, p.done) for p in sent] == [("load", 1), ("load", 5), ("check", 0)]


def test_a_token_ends_the_step_before_it() -> None:
    clock, sent = Clock(), []
    context = JobContext(1, threading.Event(), sent.append, clock)
    for done in (512, 1024):
        context.progress("reading the prompt", done, 1941, "tokens")
    context.emit(Token(1, "base", 0, 5, "hi"))
    clock.now = 9.0
    context.progress("reading the prompt", 512, 1941, "tokens")  # of the other side of an A/B
    context.flush()
    assert [getattr(event, "done", "token") for event in sent] == [512, 1024, "token", 512]
    assert isinstance(sent[-1], Progress)
    assert sent[-1].seconds == 0.0, "a step of the same name begins anew"


def test_events_of_the_engine_get_the_number_of_their_job() -> None:
    sent: list[Event] = []
    context = JobContext(9, threading.Event(), sent.append)
    array = np.zeros((1, 2))
    context.emit(RoutingFrame(0, array, array, 1, 10))
    context.emit(Token(0, "base", 0, 5, "hi"))
    assert [e.job for e in sent if isinstance(e, RoutingFrame | Token)] == [9, 9]


def test_a_job_may_run_between_two_tokens_of_the_running_one_but_never_before_an_earlier_job():
    order: list[str] = []
    go, queued = threading.Event(), threading.Event()
    ended: list[JobEnded] = []
    worker = Worker(lambda e: ended.append(e) if isinstance(e, JobEnded) else None)

    def answer(ctx: Context) -> Report:
        order.append("token 1")
        go.set()
        assert queued.wait(5)
        ctx.interlude()
        order.append("token 2")
        return TextReport("answer")

    def step(name: str) -> Callable[[Context], Report]:
        return lambda _ctx: (order.append(name), TextReport(name))[1]

    worker.submit("chat", answer)
    assert go.wait(5)
    worker.submit("steer", step("steer"), between=True)
    worker.submit("prune", step("prune"))
    worker.submit("steer again", step("steer again"), between=True)
    queued.set()
    while len(ended) < 4:
        time.sleep(0.001)
    worker.close()
    assert order == ["token 1", "steer", "token 2", "prune", "steer again"]
    assert [e.line for e in ended] == ["steer", "chat", "prune", "steer again"]
