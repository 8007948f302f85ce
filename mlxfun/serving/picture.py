"""Draws the picture of a server on the model's thread, for those who look from other threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from mlxfun.serving.ask import Figures
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.requests import Totals
from mlxfun.serving.scheduler import Scheduler
from mlxfun.serving.snapshot import Doing, ServingReport

DRAW_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""Who has not looked for so long looks no more."""


class Picture:
    """The newest picture. address: where the server listens."""

    def __init__(self, options: ServeOptions) -> None:
        self.address = str(options.address)
        self._newest = ServingReport(self.address, "open")
        self._drawn = self._looked = -LOOK_SECONDS
        self._counted: tuple[float, int] = (monotonic(), 0)

    def looked_at(self) -> None:
        """Somebody looks."""
        self._looked = monotonic()

    def newest(self, doing: Doing) -> ServingReport:
        """What was drawn last."""
        return replace(self._newest, address=self.address, doing=doing)

    def draw(
        self, scheduler: Scheduler, totals: Totals, figures: Callable[[], Figures], idle: bool
    ) -> None:
        """Draw anew, unless that was done a moment ago; on the model's thread."""
        now = monotonic()
        if now - self._drawn < DRAW_SECONDS and not idle:
            return
        self._drawn = now
        before, tokens = self._counted
        rate = self._newest.rate
        if now - before >= 1.0:
            rate = (totals.completion_tokens - tokens) / (now - before)
            self._counted = (now, totals.completion_tokens)
        self._newest = ServingReport(
            address=self.address,
            doing="open",
            requests=scheduler.lines(now),
            clients=totals.ledger.clients,
            problems=totals.ledger.problems,
            figures=figures(),
            rate=0.0 if idle else rate,
            lit=scheduler.lit(now - self._looked < LOOK_SECONDS),
        )
