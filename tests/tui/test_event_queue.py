"""Where the worker's thread and the screen's thread meet."""

from __future__ import annotations

import threading

import numpy as np

from mlxfun.events import Event, JobEnded, JobStarted, Progress, RoutingFrame, Token
from tui.event_queue import EventQueue


def frame(job: int, samples: int) -> RoutingFrame:
    return RoutingFrame(job, np.zeros((1, 1), np.int64), np.zeros((1, 1)), samples, samples)


def progress(job: int, done: int) -> Progress:
    return Progress(job, "collect", done, 10, "samples", 1.0)


def ended(job: int) -> JobEnded:
    return JobEnded(job, "x", None, "failed", 0.0, "")


def test_events_come_out_in_the_order_they_went_in() -> None:
    feed = EventQueue(lambda: None)
    events: list[Event] = [JobStarted(1, "x"), Token(1, "base", 0, 5, "a"), ended(1)]
    for event in events:
        feed.push(event)
    assert feed.drain() == events
    assert feed.drain() == []


def test_a_newer_frame_takes_the_place_of_one_that_nobody_has_drawn() -> None:
    feed = EventQueue(lambda: None)
    feed.push(JobStarted(1, "x"))
    for samples in (1, 2, 3):
        feed.push(frame(1, samples))
        feed.push(progress(1, samples))
    events = feed.drain()
    assert [type(event) for event in events] == [JobStarted, RoutingFrame, Progress]
    assert isinstance(events[1], RoutingFrame)
    assert events[1].samples == 3
    assert isinstance(events[2], Progress)
    assert events[2].done == 3


def test_the_frames_of_the_next_job_stay_behind_its_start() -> None:
    feed = EventQueue(lambda: None)
    for event in (frame(1, 1), ended(1), JobStarted(2, "y"), frame(2, 9)):
        feed.push(event)
    events = feed.drain()
    assert [type(event) for event in events] == [RoutingFrame, JobEnded, JobStarted, RoutingFrame]
    assert [e.samples for e in events if isinstance(e, RoutingFrame)] == [1, 9]


def test_every_token_arrives() -> None:
    feed = EventQueue(lambda: None)
    for index in range(100):
        feed.push(Token(1, "base", index, index, "a"))
    assert [e.index for e in feed.drain() if isinstance(e, Token)] == list(range(100))


def test_only_events_that_should_not_wait_wake_the_screen() -> None:
    woken: list[int] = []
    feed = EventQueue(lambda: woken.append(1))
    feed.push(frame(1, 1))
    feed.push(progress(1, 1))
    feed.push(Token(1, "base", 0, 0, "a"))
    assert woken == []
    feed.push(ended(1))
    assert woken == [1]


def test_nothing_is_lost_or_doubled_when_two_threads_use_it() -> None:
    feed, seen = EventQueue(lambda: None), []

    def write() -> None:
        for index in range(2000):
            feed.push(Token(1, "base", index, index, "a"))

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        seen += [e.index for e in feed.drain() if isinstance(e, Token)]
    seen += [e.index for e in feed.drain() if isinstance(e, Token)]
    assert seen == list(range(2000))
