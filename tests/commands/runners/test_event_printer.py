"""The printer prints events in order, and knows when there is nothing left to wait for."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest

from commands.runners.event_printer import EventPrinter
from mlxfun.events import Event, JobEnded, JobStarted, Progress, Token
from mlxfun.report import TextReport


class Source:
    """An engine that says what the test says."""

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        self.say = listener


class Interrupted(io.StringIO):
    """A stream on which Ctrl-C falls while it is written to."""

    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def test_an_interrupt_while_the_end_is_printed_does_not_wait_for_a_second_end() -> None:
    source = Source()
    printer = EventPrinter(source, as_json=True, out=Interrupted(), err=io.StringIO())
    source.say(JobEnded(1, "info", TextReport("x"), None, 0.0, ""))
    with pytest.raises(KeyboardInterrupt):
        printer.follow(1)
    began = time.monotonic()
    printer.follow_briefly(1, 5.0)
    assert time.monotonic() - began < 1.0


def test_the_end_of_another_job_is_waited_past() -> None:
    source, out = Source(), io.StringIO()
    printer = EventPrinter(source, as_json=False, out=out, err=io.StringIO())
    for job in (1, 2):
        source.say(JobEnded(job, "info", TextReport(f"job {job}"), None, 0.0, ""))
    printer.follow_briefly(2, 5.0)
    assert out.getvalue() == "job 1\njob 2\n"


def test_progress_of_a_step_comes_before_the_token_that_ends_it() -> None:
    source, both = Source(), io.StringIO()
    printer = EventPrinter(source, stream=True, out=both, err=both)
    source.say(JobStarted(1, "chat hi"))
    for done in (512, 1024):
        source.say(Progress(1, "reading the prompt", done, 1941, "tokens", 0.0))
    source.say(Token(1, "base", 0, 7, "Hello."))
    source.say(JobEnded(1, "chat hi", TextReport("."), None, 0.0, ""))
    printer.follow(1)
    assert both.getvalue().splitlines()[1:] == [
        "reading the prompt: 1,024 of 1,941 tokens (53%)", "Hello.."
    ]  # fmt: skip


def test_two_answers_that_grow_at_once_are_shown_when_both_stand() -> None:
    source, out = Source(), io.StringIO()
    printer = EventPrinter(source, stream=True, out=out, err=io.StringIO())
    source.say(JobStarted(1, "chat hi"))
    source.say(Token(1, "base", 0, 7, "Hello."))
    source.say(JobEnded(1, "chat hi", TextReport("."), None, 0.0, ""))
    source.say(JobStarted(2, "ab hi"))
    for side, text in (("base", "Yes"), ("candidate", "No")):
        source.say(Token(2, side, 0, 7, text))
    source.say(JobEnded(2, "ab hi", TextReport("both"), None, 0.0, ""))
    printer.follow(1)
    printer.follow(2)
    assert out.getvalue() == "Hello..\nboth\n"
