"""The chat of the shell as one more client of the batch that answers requests."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from mlxfun.context import Context
from mlxfun.data.datasets import Tokenizer, require_known
from mlxfun.errors import Cancelled, ModelError
from mlxfun.events import Side
from mlxfun.generation.decoder import PREFILL_STEP, Decoded, OnToken
from mlxfun.generation.options import FinishReason, GenerateOptions
from mlxfun.serving.ask import Admitted, Ask, Ended, Failed, Frame, Reading, Said, Sampling
from mlxfun.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from mlxfun.session.session import Session


class ChatInBatch:
    """See mlxfun.generation.conversation.AnsweredElsewhere. Its tokens are drawn as the session's
    own decoder draws them; a change of steering in mid-answer acts on the next token that is drawn,
    and until then touches no other request."""

    def __init__(self, session: Session, scheduler: Scheduler) -> None:
        self._tokenizer, self._scheduler = session.tokenizer, scheduler
        self._vocabulary = session.anatomy.vocabulary
        self._routed = bool(session.anatomy.layers)

    def __call__(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        side: Side,
        on_token: OnToken,
        ctx: Context,
    ) -> Decoded:
        require_known(prompt, self._vocabulary, "the prompt")
        o, scheduler = options, self._scheduler
        drawn = Sampling(o.temperature, o.top_p, seed=o.seed)
        asked = Ask(
            tuple(prompt), o.max_tokens, drawn, side=side, parts=False, routing=self._routed
        )
        answer = _Answer(self._tokenizer, on_token, ctx)
        number = scheduler.join(asked, answer.hear)
        try:
            with scheduler.driven():
                while answer.reason is None:
                    answer.check()
                    ctx.check()
                    scheduler.drive()
                    ctx.interlude()
        except Cancelled:
            answer.reason = "cancelled"
        finally:
            scheduler.cancel(number)  # nothing, if it is over
        return answer.decoded()


class _Answer:
    """What was heard of it. reason: why it is over, None before."""

    def __init__(self, tokenizer: Tokenizer, on_token: OnToken, ctx: Context) -> None:
        self._text = tokenizer.detokenizer
        self._text.reset()
        self._on_token, self._ctx = on_token, ctx
        self._tokens: list[int] = []
        self._cached, self._began = 0, monotonic()
        self._problem = ""
        self.reason: FinishReason | None = None

    def check(self) -> None:
        """Raise ModelError for an answer that has failed."""
        if self._problem:
            raise ModelError(self._problem)

    def hear(self, frame: Frame) -> None:
        """Take a frame of the scheduler."""
        if isinstance(frame, Admitted):
            self._cached, self._began = frame.cached_tokens, monotonic()
        elif isinstance(frame, Reading) and frame.total > PREFILL_STEP:
            self._ctx.progress("reading the prompt", frame.done, frame.total, "tokens")
        elif isinstance(frame, Said):
            self._tokens.append(frame.token)
            self._text.add_token(frame.token)
            seen = frame.routing
            routing = (None, None) if seen is None else (seen.experts, seen.weights)
            text = self._text.last_segment
            self._on_token(len(self._tokens) - 1, frame.token, text, *routing)
        elif isinstance(frame, Ended):
            self.reason = frame.reason
        elif isinstance(frame, Failed):
            self._problem = frame.message

    def decoded(self) -> Decoded:
        """What it came to."""
        assert self.reason is not None
        self._text.finalize()
        seconds = monotonic() - self._began
        return Decoded(tuple(self._tokens), self._text.text, self._cached, seconds, self.reason)
