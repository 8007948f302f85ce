"""Steps the requests in flight on the model's thread, and keeps them from edits.

A request is in one lane from its admission to its end, and a lane steps only while exactly the model
is live that it was opened for. So no answer mixes two states, whatever is done to the model between
two steps.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxfun.context import SILENT, Context, as_running
from mlxfun.errors import MlxfunError, PlanError, StateError
from mlxfun.events import Side
from mlxfun.serving.ask import (
    Admitted,
    Ask,
    Ended,
    EndReason,
    Failed,
    Frame,
    Reading,
    Said,
)
from mlxfun.serving.lane_set import Lanes
from mlxfun.serving.lanes import Lane, Step
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.prompt_cache import PromptCache
from mlxfun.serving.requests import Deliver, Port, Request, Totals, Wish
from mlxfun.serving.routing import Observer, Watch
from mlxfun.serving.snapshot import RequestLine
from mlxfun.serving.text import AnswerText
from mlxfun.text import brief

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.session.chat_counts import TrafficCounter
    from mlxfun.session.session import Session

log = logging.getLogger(__name__)


FRAME_SECONDS = 0.25
"""How often the routing of the traffic is shown."""

TURN_SECONDS = 0.05
"""How long a lane steps before the next one does: making another side live takes a moment."""

ABORTED = "the model is being edited and this server breaks answers off for that; ask again"
MIXED = "the model was edited while this was being answered; ask again"


class Scheduler:
    """The requests to one resident model. Lives on its thread. ctx: where frames of routing go."""

    def __init__(
        self, session: Session, options: ServeOptions, totals: Totals, port: Port, ctx: Context
    ) -> None:
        self.session = session
        self._port = port
        self._editor, self._options, self._totals = session.editor, options, totals
        self._ctx = ctx
        watch = Watch()
        observer = Observer(
            session.taps,
            options.concurrency,
            lambda: session.traffic_counter(ctx),
            norms=options.count != "lightweight",
            watch=watch,
        )
        self._cache = PromptCache(options.cache_bytes)
        self._lanes = Lanes(session, self._cache, observer)
        self._own_numbers = itertools.count(-1, -1)
        self.paused = False
        self._watch = watch
        self._over = 0  # answers that ended in the step in hand
        self._driven = False
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._live_side: Side = "base"
        self._shown = 0.0
        self._signature = self._states()
        self._out: list[tuple[Deliver, Frame]] = []
        session.before_statistics(self._lanes.count)
        self.refresh()

    # -- what the service asks -------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that are not being answered yet."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """What caches of prompts hold."""
        return self._cache.nbytes

    def lines(self, now: float) -> tuple[RequestLine, ...]:
        """The requests, those in flight first. now: monotonic seconds."""
        running = [request.line(False, now) for request in self._running.values()]
        return (*running, *(request.line(True, now) for request in self._waiting))

    def lit(self, on: bool) -> dict[int, Array]:
        """The experts of a recent token of each request in flight. on: whether somebody looks."""
        self._watch.on = on
        return {n: seen for n, seen in self._watch.seen.items() if n in self._running}

    @property
    def batched(self) -> bool:
        """Whether requests share batches."""
        return self._lanes.batched

    def submit(self, request: Request) -> None:
        """Accept a request."""
        self._waiting.append(request)

    def join(self, ask: Ask, deliver: Deliver) -> int:
        """The shell's own chat asks; its number. It waits behind no client, and is told of frames
        on this thread, in `step`."""
        number = next(self._own_numbers)
        self._waiting.appendleft(Request(number, ask, deliver, local=True, client="this shell"))
        return number

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Whoever is in the block calls `drive`, so `step` leaves the requests alone."""
        self._driven = True
        try:
            yield
        finally:
            self._driven = False

    def cancel(self, number: int) -> None:
        """The client is gone: its slot is free for another."""
        for request in self._waiting:
            if request.id == number:
                self._waiting.remove(request)
                self._totals.ended("cancelled")
                return
        request_ = self._running.pop(number, None)
        if request_ is not None and request_.wish is not None:
            self._lanes[request_.wish].remove(number)
            self._totals.ended("cancelled")
            self._totals.ledger.add(request_.client, generated=request_.generated)

    def refresh(self) -> None:
        """A command is over: what it changed holds for the requests that are admitted from now on."""
        self._live_side = self._editor.side
        states = self._states()
        if states != self._signature:
            self._signature = states
            self._forget()

    def _states(self) -> tuple[str, ...]:
        staged = self._editor.staged
        candidate = staged.state if staged is not None else ""
        return self._editor.state, candidate, self._editor.steering_of("base").key

    def _forget(self) -> None:
        """Drop what was made under states that are gone."""
        self._lanes.forget()
        self._lanes.close_empty()

    def step(self, borrowed: bool = False) -> bool:
        """One turn of one lane, unless it is `driven`; whether there is anything left to do.

        borrowed: between two tokens of a command, which may have made another model live for its
        duration: a lane whose model is not live then waits.
        """
        return True if self._driven else self.drive(borrowed)

    def drive(self, borrowed: bool = False) -> bool:
        """See `step`."""
        self._port.take(self)
        self._admit()
        lane = self._lanes.next()
        if lane is not None:
            # A cancel of the command that this runs between the tokens of is none of requests.
            with as_running(SILENT):
                self._turn(lane, borrowed)
        self._flush()
        return bool(self._running or self._waiting)

    def settle(self, ctx: Context) -> None:
        """Before an edit: end the requests in flight, or break them off, as was chosen.

        The shell's own chat is set aside, to go on behind the edit where it stands. Nothing is
        admitted meanwhile. Raises Cancelled.
        """
        self._set_aside()
        if self._options.on_edit == "abort":
            self.abort(503, ABORTED)
        total = len(self._running)
        while self._running:
            ctx.check()
            done = total - len(self._running)
            ctx.progress("waiting for requests in flight", done, total, "requests")
            self._port.take(self)
            lane = self._lanes.next()
            if lane is not None:
                with as_running(SILENT):
                    self._turn(lane, borrowed=False)
            self._flush()
        self._lanes.close_all()

    def _set_aside(self) -> None:
        for request in [r for r in self._running.values() if r.local and r.wish is not None]:
            assert request.wish is not None
            del self._running[request.id]
            request.moved = self._lanes[request.wish].take_out(request.id)
            self._waiting.appendleft(request)

    def abort(self, status: int, message: str) -> None:
        """Break all requests in flight off."""
        for request in list(self._running.values()):
            self._fail(request, status, message)
        self._lanes.close_all()
        self._flush()

    def close(self, message: str) -> None:
        """Break everything off, what waits included."""
        self.abort(503, message)
        while self._waiting:
            self._fail(self._waiting.popleft(), 503, message)
        self._flush()
        self._lanes.end()
        self._lanes.forget()

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Put waiting requests into lanes, first come, first served among those of a lane."""
        for request in list(self._waiting):
            others = sum(not running.local for running in self._running.values())
            full = self.paused or others >= self._options.concurrency
            if (full and not request.local) or self._is_being_read(request.ask.group):
                continue
            wish = self._wish(request.ask)
            try:
                lane = self._lanes.of(wish)
                if not lane.room:
                    continue
                self._waiting.remove(request)
                self._begin(request, wish, lane)
            except (StateError, PlanError) as problem:
                status = 409 if isinstance(problem, StateError) else 400
                self._drop(request, status, brief(str(problem)))
            except Exception as problem:
                # One request that cannot be begun must not harm the others.
                log.exception("request %d could not be begun", request.id)
                self._drop(request, 500, f"the request could not be begun: {_words(problem)}")

    def _is_being_read(self, group: int) -> bool:
        """Whether a request of that group reads the prompt that all of them have."""
        return group > 0 and any(
            request.ask.group == group and not request.first for request in self._running.values()
        )

    def _wish(self, ask: Ask) -> Wish:
        return (self._live_side if ask.side == "live" else ask.side), ask.steer

    def _begin(self, request: Request, wish: Wish, lane: Lane) -> None:
        moved, request.moved = request.moved, None
        request.text = request.text or AnswerText(request.ask, self.session.tokenizer)
        cached = lane.add(request.id, request.ask, moved)
        request.wish = wish
        self._running[request.id] = request
        if moved is not None:
            return
        request.side, request.cached = wish[0], cached
        prompt = len(request.ask.prompt)
        self._totals.ledger.add(request.client, requests=1, prompt=prompt, cached=cached)
        self._totals.prompt_tokens += len(request.ask.prompt)
        self._totals.cached_tokens += cached
        state, steering = lane.key
        self._tell(request, Admitted(state, steering, wish[0], cached))

    def _drop(self, request: Request, status: int, message: str) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        self._fail(request, status, message)

    # -- stepping --------------------------------------------------------------------------------

    def _turn(self, wish: Wish, borrowed: bool) -> None:
        """A turn of a lane: one step, or several where another model must be made live for it."""
        lane = self._lanes[wish]
        until = monotonic() + (TURN_SECONDS if wish[0] != self._live_side or wish[1] else 0.0)
        try:
            with self._lanes.live(wish):
                if self._editor.key() != lane.key:
                    if borrowed:
                        return
                    raise StateError(MIXED)
                counter = self.session.traffic_counter(self._ctx)
                while len(lane):
                    for step in lane.step():
                        self._stepped(step, lane)
                    self._totals.steps += 1
                    self._counted(counter)
                    # Jobs of the shell may run between any two tokens of its own chat.
                    if self._driven or monotonic() >= until:
                        break
            if not len(lane) and wish[1] is not None:
                self._lanes.close(wish)  # as many are thinkable as there are ways to steer
        except Exception as problem:  # noqa: BLE001
            # Whatever a step raises is the end of the requests in it, and of nothing else.
            self._broken(wish, problem)

    def _counted(self, counter: TrafficCounter | None) -> None:
        """Count the answers that are over, and show what was counted now and then."""
        over, self._over = self._over, 0
        if counter is None:
            return
        for _ in range(over):
            counter.end()
        if monotonic() - self._shown > FRAME_SECONDS:
            self._shown = monotonic()
            counter.show()

    def _broken(self, wish: Wish, problem: Exception) -> None:
        if isinstance(problem, MlxfunError):
            message = brief(str(problem))
        else:
            log.error("a step of the server failed", exc_info=problem)
            message = f"the model failed at this answer: {_words(problem)}"
        for request in [r for r in self._running.values() if r.wish == wish]:
            self._fail(request, 500, message)
        try:
            self._lanes.close(wish)
        except Exception:
            log.exception("closing a broken lane failed")
        self._lanes.forget()
        mx.clear_cache()

    def _stepped(self, step: Step, lane: Lane) -> None:
        request = self._running.get(step.id)
        if request is None or request.text is None:
            return
        if step.token is None and step.ended is None:
            self._tell(request, Reading(*step.read))
            return
        text = request.text
        if step.token is not None:
            request.generated += 1
            request.first = request.first or monotonic()
            self._totals.completion_tokens += 1
            if step.ended != "stop":
                said = Said(step.token, text.add(step.token), step.logprob, step.routing)
                self._tell(request, said)
        if step.ended is not None or text.stopped:
            if step.ended is None:
                lane.remove(step.id)
            stopped = text.stopped or step.ended == "stop"
            self._end(request, "stop" if stopped else "length")

    def _end(self, request: Request, reason: EndReason) -> None:
        assert request.text is not None
        del self._running[request.id]
        self._over += not request.local  # the chat counts its own
        self._totals.ended(reason)
        self._totals.ledger.add(request.client, generated=request.generated)
        self._tell(request, Ended(reason, request.text.end(), request.generated, request.text.met))

    def _fail(self, request: Request, status: int, message: str) -> None:
        self._running.pop(request.id, None)
        self._totals.ended("failed")
        self._totals.ledger.failed(request.client, status, message)
        self._tell(request, Failed(status, message))

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out:
            self._port.post(out)

    def _tell(self, request: Request, frame: Frame) -> None:
        if request.local:
            request.deliver(frame)
        else:
            self._out.append((request.deliver, frame))


def _words(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return brief(f"{type(problem).__name__}: {text}" if text else type(problem).__name__)
