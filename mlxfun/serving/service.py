"""Between threads: clients ask on theirs, the model answers on its own; only plain data crosses."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any, TypeVar

from mlxfun.context import Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import MlxfunError
from mlxfun.events import Event, Notice, Side
from mlxfun.serving.ask import Ask, Ended, Failed, Figures, Frame
from mlxfun.serving.chatting import ChatInBatch
from mlxfun.serving.options import Address, ServeOptions
from mlxfun.serving.picture import Picture
from mlxfun.serving.requests import Deliver, Intake, Request, Totals
from mlxfun.serving.scheduler import Scheduler
from mlxfun.serving.snapshot import Doing, ServingReport

if TYPE_CHECKING:
    from mlxfun.session.session import Session

log = logging.getLogger(__name__)

T = TypeVar("T")
Poster = Callable[[list[tuple[Deliver, Frame]]], None]

STOPPING = "the server is stopping: nothing new is started"
CLOSED = "the server has stopped before this answer was complete"
NO_MODEL = "no model is loaded: the person at the shell has to load one first"
SHAPES = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length")


class Refused(Exception):
    """A request that is not accepted. status: for HTTP; the text is one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Card:
    """The resident model as clients see it, made anew after each command.

    state: of the committed weights. sides: the state of each side that there is. live: the side
    that answers. tokenizer: the HTTP side's own, so that two threads never use one. vocabulary,
    context: tokens, None where the model does not say. loaded: when, in seconds since 1970.
    """

    model: str
    state: str
    sides: tuple[tuple[Side, str], ...]
    live: Side
    steering: str
    tokenizer: Tokenizer
    vocabulary: int | None
    context: int | None
    experts: int
    loaded: int
    layers: tuple[int, ...] = ()


class Service:
    """The queue in front of the scheduler. `submit`, `cancel`, `drain`, `card` and `figures` may be
    used from any thread; `step`, `settle`, `close` and `refresh` are for the model's thread."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self._wake: Callable[[], None] = lambda: None
        self._emit: Callable[[Event], None] | None = None
        self._calls: deque[tuple[Callable[[Any], Any], Future[Any]]] = deque()
        self._post: Poster | None = None
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # guards _asked, _gone, _open and _stopping
        self._asked: deque[Request] = deque()
        self._gone: set[int] = set()
        self._open: set[int] = set()
        self._stopping = False
        self._idle = threading.Event()
        self._idle.set()
        self._scheduler: Scheduler | None = None
        self._totals = Totals()
        self._card: Card | None = None
        self._doing: Doing = "open"
        self._picture = Picture(options)

    # -- from any thread -------------------------------------------------------------------------

    @property
    def card(self) -> Card | None:
        """The resident model, None without one."""
        return self._card

    @property
    def stopping(self) -> bool:
        """Whether nothing new is accepted."""
        return self._stopping or self._doing in ("draining", "stopped")

    @property
    def doing(self) -> Doing:
        """Whether requests are answered, held back or refused."""
        return self._doing

    @doing.setter
    def doing(self, doing: Doing) -> None:
        self._doing = doing
        self._wake()

    def listens_at(self, address: Address) -> None:
        """Where the server is."""
        self._picture.address = str(address)

    def refused(self, client: str, status: int, message: str) -> None:
        """Note a request that was refused."""
        self._totals.ledger.refused(client, status, message)
        self._wake()

    def snapshot(self) -> ServingReport:
        """What the server does, as of a moment ago. Calling it now and then makes the model's thread
        look at the routing of a step now and then, see ServingReport.lit."""
        self._picture.looked_at()
        return self._picture.newest(self._doing)

    def connect(self, wake: Callable[[], None], emit: Callable[[Event], None]) -> None:
        """How the model's thread learns that there is something to do, and where frames of routing
        go."""
        self._wake, self._emit = wake, emit

    def call(self, work: Callable[[Session], T]) -> Future[T]:
        """Have something read off the session, on the model's thread between two steps. What it
        raises is raised by the future; Refused without a model."""
        future: Future[T] = Future()
        with self._lock:
            if self.stopping or self._card is None:
                raise Refused(503, STOPPING if self.stopping else NO_MODEL)
            self._calls.append((work, future))
        self._wake()
        return future

    def _run_calls(self) -> None:
        with self._lock:
            calls = list(self._calls)
            self._calls.clear()
        for work, future in calls:
            if self._scheduler is None:
                future.set_exception(Refused(503, NO_MODEL))
                continue
            try:
                future.set_result(work(self._scheduler.session))
            except Exception as problem:  # noqa: BLE001
                # Thread boundary: whoever asked is told.
                future.set_exception(problem)

    def deliver_with(self, post: Poster) -> None:
        """How frames get to the thread of those who ask."""
        self._post = post

    def submit(self, ask: Ask, deliver: Deliver, client: str = "") -> int:
        """Queue a request; its number. Raises Refused. deliver: called with each frame, the last of
        them Ended or Failed, unless it is cancelled."""
        with self._lock:
            if self.stopping:
                raise Refused(503, STOPPING)
            if self._card is None:
                raise Refused(503, NO_MODEL)
            if len(self._open) >= self.options.concurrency + self.options.waiting:
                raise Refused(
                    429, f"{len(self._open)} requests are waiting already; ask again later"
                )
            number = next(self._ids)
            self._open.add(number)
            self._idle.clear()
            closing = self._closing(number, deliver)
            self._asked.append(Request(number, ask, closing, client=client))
        self._wake()
        return number

    def cancel(self, number: int) -> None:
        """The client is gone, or has enough. Nothing happens if the answer is over."""
        with self._lock:
            if number not in self._open:
                return
            self._open.discard(number)
            self._gone.add(number)
            self._settle_idle()
        self._wake()

    def stop(self, seconds: float) -> bool:
        """Accept nothing more, and wait at most so long for answers; whether all are complete."""
        with self._lock:
            self._stopping = True
        return self._idle.wait(seconds)

    def figures(self) -> Figures:
        """How the server does, as of a moment ago."""
        scheduler, totals = self._scheduler, self._totals
        with self._lock:
            asked = len(self._asked)
        return Figures(
            in_flight=scheduler.in_flight if scheduler else 0,
            waiting=asked + (scheduler.waiting if scheduler else 0),
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            completion_tokens=totals.completion_tokens,
            cache_bytes=scheduler.cache_bytes if scheduler else 0,
            steps=totals.steps,
            by_outcome=dict(totals.outcomes),
        )

    def _closing(self, number: int, deliver: Deliver) -> Deliver:
        def closing(frame: Frame) -> None:
            if isinstance(frame, Ended | Failed):
                with self._lock:
                    self._open.discard(number)
                    self._settle_idle()
            deliver(frame)

        return closing

    def _settle_idle(self) -> None:
        if not self._open:
            self._idle.set()

    # -- on the model's thread -------------------------------------------------------------------

    def refresh(self, session: Session | None) -> None:
        """A command is over, and `session` is the resident model now."""
        scheduler = self._scheduler
        if session is None or (scheduler is not None and scheduler.session is not session):
            if scheduler is not None:
                scheduler.close(NO_MODEL)
            self._scheduler = scheduler = None
        if session is None:
            self._card = None
            return
        known = self._card if scheduler is not None else None
        if scheduler is None:
            if self.options.count != "off" and session.anatomy.layers:
                session.set_counting(True)
            emitting = _Emitting(self._emit)
            self._scheduler = scheduler = Scheduler(
                session, self.options, self._totals, self, emitting
            )
            if scheduler.batched:
                session.chat_through(ChatInBatch(session, scheduler))
            session.before_close.append(self._let_go)
        scheduler.refresh()
        self._card = card_of(session, known)

    def _let_go(self) -> None:
        """The session closes: hold nothing of the model any longer."""
        if self._scheduler is not None:
            self._scheduler.close(NO_MODEL)
        self._scheduler = self._card = None

    def step(self, borrowed: bool) -> bool:
        """See mlxfun.session.worker.Background."""
        self._run_calls()
        scheduler = self._scheduler
        if scheduler is None:
            self._refuse_all(503, NO_MODEL)
            return False
        scheduler.paused = self._doing == "paused"
        try:
            more = scheduler.step(borrowed)
            self._picture.draw(scheduler, self._totals, self.figures, idle=not scheduler.in_flight)
            return more and (scheduler.in_flight > 0 or not scheduler.paused)
        except Exception:
            # A mistake of the scheduler itself: whoever waits is told, and the shell lives on.
            log.exception("the scheduler failed")
            scheduler.close("the server failed at this request; ask again")
            return False

    def settle(self, ctx: Context) -> None:
        """See mlxfun.session.worker.Background."""
        if self._scheduler is not None:
            self._scheduler.settle(ctx)

    def close(self) -> None:
        """See mlxfun.session.worker.Background."""
        with self._lock:
            self._stopping = True
        if self._scheduler is not None:
            self.take(self._scheduler)
            self._scheduler.close(CLOSED)
            self._save(self._scheduler.session)
            self._scheduler = None
        self._run_calls()
        self._refuse_all(503, CLOSED)

    def _save(self, session: Session) -> None:
        if self.options.auto_save is None:
            return
        try:
            session.save_stats(self.options.auto_save)
        except (MlxfunError, OSError) as problem:
            log.error("the statistics were not saved: %s", problem)
            if self._emit is not None:
                self._emit(Notice("warning", f"the statistics were not saved: {problem}"))

    def take(self, intake: Intake) -> None:
        """Hand what came in over to the scheduler."""
        with self._lock:
            asked, gone = list(self._asked), set(self._gone)
            self._asked.clear()
            self._gone.clear()
        for request in asked:
            if request.id not in gone:
                intake.submit(request)
        for number in gone:
            intake.cancel(number)

    def post(self, frames: list[tuple[Deliver, Frame]]) -> None:
        """Deliver frames. Where nobody listens any more, nothing is lost."""
        if self._post is not None:
            self._post(frames)

    def _refuse_all(self, status: int, message: str) -> None:
        with self._lock:
            asked = list(self._asked)
            self._asked.clear()
        if asked:
            self.post([(request.deliver, Failed(status, message)) for request in asked])


class _Emitting(Context):
    """A context for what goes on between jobs."""

    def __init__(self, emit: Callable[[Event], None] | None) -> None:
        self._to = emit

    def emit(self, event: Event) -> None:
        """Pass an event on."""
        if self._to is not None:
            self._to(event)


def card_of(session: Session, known: Card | None) -> Card:
    """What clients see of a session. known: the card so far, of the same session."""
    editor = session.editor
    staged = editor.staged
    sides: list[tuple[Side, str]] = [("base", editor.state)]
    if staged is not None:
        sides.append(("candidate", staged.state))
    return Card(
        model=editor.model_name,
        state=editor.state,
        sides=tuple(sides),
        live=editor.side,
        steering=editor.steering.key,
        tokenizer=known.tokenizer if known is not None else _own(session.tokenizer),
        vocabulary=session.anatomy.vocabulary,
        context=_context(session.config),
        experts=session.anatomy.num_experts if session.anatomy.layers else 0,
        loaded=known.loaded if known is not None else int(time()),
        layers=tuple(session.anatomy.indices),
    )


def _own(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer for another thread: a copy, where it can be copied."""
    try:
        return copy.deepcopy(tokenizer)
    except Exception as problem:  # noqa: BLE001
        # Tokenizers of code that comes with a model may hold what cannot be copied.
        log.warning("the tokenizer is shared between threads: %s", problem)
        return tokenizer


def _context(config: dict[str, Any]) -> int | None:
    """The longest text that the model was made for, in tokens."""
    for node in (config, config.get("text_config") or {}):
        for name in SHAPES:
            value = node.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
