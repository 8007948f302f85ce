"""A scheduler without HTTP and without a thread, for tests that step it themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxfun import Session
from mlxfun.context import SILENT
from mlxfun.serving.ask import Ask, Ended, Frame, Said, Sampling
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.requests import Intake, Request, Totals
from mlxfun.serving.scheduler import Scheduler

LENGTHS = (3, 40, 9, 21, 9, 1)
PROMPTS = [
    tuple(np.random.default_rng(n).integers(3, 4000, length).tolist())
    for n, length in enumerate(LENGTHS)
]


class Desk:
    """Asks a scheduler and reads its frames, on one thread."""

    def __init__(self, session: Session, **options: Any) -> None:
        self.asked: list[Request] = []
        self.gone: list[int] = []
        self.totals = Totals()
        self.frames: dict[int, list[Frame]] = {}
        self.scheduler = Scheduler(session, ServeOptions(**options), self.totals, self, SILENT)

    def take(self, intake: Intake) -> None:
        for request in self.asked:
            intake.submit(request)
        for number in self.gone:
            intake.cancel(number)
        self.asked, self.gone = [], []

    def post(self, frames: list[tuple[Callable[[Frame], None], Frame]]) -> None:
        for deliver, frame in frames:
            deliver(frame)

    def ask(self, ask: Ask) -> int:
        number = len(self.frames)
        self.frames[number] = []
        self.asked.append(Request(number, ask, self.frames[number].append))
        return number

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.scheduler.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def text(self, number: int) -> str:
        pieces = []
        for frame in self.frames[number]:
            if isinstance(frame, Said | Ended):
                pieces += frame.pieces
        return "".join(piece.text for piece in pieces)

    def last(self, number: int) -> Frame:
        return self.frames[number][-1]


def plain(prompt: tuple[int, ...], tokens: int, **more: Any) -> Ask:
    bias = ((2, -100.0),)  # the end of a turn does not come
    return Ask(prompt, tokens, Sampling(logit_bias=bias), parts=False, top_logprobs=0, **more)


def tokens_of(desk: Desk, number: int) -> list[int]:
    said = [frame for frame in desk.frames[number] if isinstance(frame, Said)]
    return [frame.logprob.token for frame in said if frame.logprob is not None]
