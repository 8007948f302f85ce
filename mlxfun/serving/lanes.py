"""Lanes: the requests that one state of the weights and one steering answer, token by token.

Requests share a lane, and so a batch, only if they are answered by exactly the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch, StopSequences
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlxfun.generation.decoder import Decoded, Decoder, Steps, advance
from mlxfun.generation.kv_cache import Key
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.packed_cache import new_cache
from mlxfun.serving.ask import Ask, TokenLogprob, TokenRouting
from mlxfun.serving.prompt_cache import PromptCache
from mlxfun.serving.routing import Observer, RoutedModel
from mlxfun.serving.sampling import AloneSampler, Processor, processors_of, sampler

if TYPE_CHECKING:
    from mlxfun.session.session import Session

CPU_PREFILL = 512
GPU_PREFILL = 2048
"""Tokens of a prompt that are read between two tokens of the others."""

PROMPTS_AT_ONCE = 4
"""Prompts that are read together at most."""

TAIL = 16
"""Tokens at the end of a prompt that its next turn may not repeat: generation prompts change."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brought one request. token: None while its prompt is read, `read` tells how far
    that is. ended: "stop" for a stop token, which is no part of the answer."""

    id: int
    token: int | None = None
    read: tuple[int, int] = (0, 0)
    ended: str | None = None
    logprob: TokenLogprob | None = None
    routing: TokenRouting | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """An answer on its way from one lane to another: the state or the steering has changed in the
    middle of it. layers: the caches, which hold `tokens`; next: the token drawn last, which no
    forward has consumed; left: how many tokens may still come, that one included; draw: draws them."""

    layers: list[Any]
    tokens: list[int]
    next: int
    left: int
    draw: Callable[[mx.array], mx.array]


class Lane(Protocol):
    """One lane; lives on the model's thread. key: the state and steering that must be live."""

    key: Key

    def __len__(self) -> int:
        """How many requests are in it."""

    @property
    def room(self) -> int:
        """How many more it takes."""

    def add(self, number: int, ask: Ask, moved: Moved | None = None) -> int:
        """Take a request; how many tokens of its prompt were cached. moved: from another lane."""

    def remove(self, number: int) -> None:
        """Drop a request that is in it."""

    def take_out(self, number: int) -> Moved | None:
        """Drop a request that goes on in another lane, None if its prompt must be read anew."""

    def step(self) -> list[Step]:
        """Take a step: a token of each request, or a part of prompts."""

    def count(self) -> None:
        """Hand over what was counted of its forwards so far. Does not raise."""

    def close(self) -> None:
        """Let go of everything; what was counted is handed over."""


class _Prompts(PromptProcessingBatch):
    """Tells the model how much of what it reads is no padding."""

    def prompt(self, tokens: list[list[int]]) -> None:
        if tokens:
            self.model.reading([len(part) for part in tokens])
        super().prompt(tokens)


@dataclass(slots=True)
class _Row:
    id: int
    ask: Ask
    snapshot: bool = False  # whether the cache is to be kept once most of the prompt is read
    moved: Moved | None = None  # from another lane, where the beginning of its cache was made


class BatchLane:
    """Many requests at once, by mlx-lm's batch generator."""

    def __init__(
        self,
        session: Session,
        key: Key,
        cache: PromptCache,
        observer: Observer,
    ) -> None:
        model, tokenizer = session.model, session.tokenizer
        self.key, self._kv = key, session.kv
        self._cache, self._observer, self._tokenizer = cache, observer, tokenizer
        self._model = RoutedModel(model, observer)
        self._rows: dict[int, _Row] = {}
        self._stops = StopSequences([(stop,) for stop in sorted(tokenizer.eos_token_ids)])
        # Such a cache cannot be shortened once it has gone round: it only fits as a whole.
        self._rotating = any(isinstance(c, RotatingKVCache) for c in make_prompt_cache(model))
        self._most = observer.concurrency + 1  # the chat of the shell need not wait for a slot
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self._generator = BatchGenerator(
            cast(nn.Module, self._model),
            completion_batch_size=self._most,
            prefill_batch_size=min(PROMPTS_AT_ONCE, self._most),
            prefill_step_size=GPU_PREFILL if on_gpu else CPU_PREFILL,
            stream=mx.default_stream(mx.default_device()),
        )
        g = self._generator
        g._old_wired_limit = None  # Lanes sets it for all of them, and takes it back at the end
        g._prompt_batch = _Prompts.empty(g.model, g.sampler, g.prefill_step_size)

    def _process(self, ask: Ask) -> list[Processor]:
        return processors_of(ask, self._tokenizer, self._observer.taps.anatomy.vocabulary)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def room(self) -> int:
        return self._most - len(self._rows)

    def add(self, number: int, ask: Ask, moved: Moved | None = None) -> int:
        if moved is not None:
            held, left = (moved.layers, moved.tokens), max(moved.left - 1, 1)
            uid = self._insert(ask, [[moved.next]], left, held, moved.draw)
            self._rows[uid] = _Row(number, ask, moved=moved)
            self._model.entering = True
            return 0
        begun = self._cache.begin(self.key, ask.prompt)
        rest = list(ask.prompt[begun.tokens :])
        cut = len(rest) - TAIL
        segments = [rest[:cut], rest[cut:]] if cut > 0 else [rest]
        known = (begun.layers, list(ask.prompt[: begun.tokens]))
        uid = self._insert(ask, segments, ask.max_tokens, known, sampler(ask.sampling))
        wanted = self._rotating or ask.group > 0
        self._rows[uid] = _Row(number, ask, snapshot=cut > 0 and wanted)
        return begun.tokens

    def _insert(
        self,
        ask: Ask,
        segments: list[list[int]],
        tokens: int,
        known: tuple[list[Any] | None, list[int]],
        draw: Callable[[mx.array], mx.array],
    ) -> int:
        """known: a cache, None for an empty one, and the tokens that it holds."""
        layers, fed = known
        (uid,) = self._generator.insert_segments(
            [segments],
            max_tokens=[tokens],
            caches=[new_cache(self._model.wrapped, self._kv) if layers is None else layers],
            all_tokens=[fed],
            samplers=[draw],
            logits_processors=[self._process(ask)],
            stop_sequences=[self._stops],
        )
        return int(uid)

    def remove(self, number: int) -> None:
        for uid, row in list(self._rows.items()):
            if row.id == number:
                self._generator.remove([uid])
                del self._rows[uid]

    def take_out(self, number: int) -> Moved | None:
        uid = next(uid for uid, row in self._rows.items() if row.id == number)
        batch, moved = self._generator._generation_batch, self._rows[uid].moved
        if uid in batch.uids:
            at = batch.uids.index(uid)
            left = batch.max_tokens[at] - batch._num_tokens[at]
            layers, tokens = batch.extract_cache(at), list(batch.tokens[at])
            drawn = int(batch._next_tokens[at].item())
            moved = Moved(layers, tokens, drawn, left, batch.samplers[at])
        self.remove(number)
        return moved

    def step(self) -> list[Step]:
        decoding = list(self._generator._generation_batch.uids)
        rows = [self._rows[uid] for uid in decoding]
        asks, numbers = [row.ask for row in rows], [row.id for row in rows]
        self._model.begin(asks, numbers, self._observer.counter())
        prompts, generated = self._generator.next()
        routing = self._model.end()
        entered = [response.uid for response in prompts if response.end_of_prompt]
        found = []
        for response in prompts:
            moved = self._rows[response.uid].moved
            if moved is None:
                found.append(self._read(response))
            elif response.end_of_prompt:
                found.append(self._go_on(response.uid, moved, entered.index(response.uid)))
        for row, response in enumerate(generated):
            seen = routing(row, int(response.token)) if routing is not None else None
            found.append(self._token(response, seen))
        return found

    def _go_on(self, uid: int, moved: Moved, place: int) -> Step:
        """The token with which an answer has come here is consumed. place: its row among those that
        began in this step."""
        row, token = self._rows[uid], moved.next
        ended = "length" if moved.left == 1 else None
        ended = "stop" if token in self._tokenizer.eos_token_ids else ended
        routing = self._model.entered(place, token) if row.ask.routing else None
        if ended is not None:
            self.remove(row.id)
        return Step(row.id, token, ended=ended, routing=routing)

    def _read(self, response: Any) -> Step:
        row = self._rows[response.uid]
        if response.end_of_segment and not response.end_of_prompt and row.snapshot:
            row.snapshot = False
            layers, tokens = self._generator.extract_cache([response.uid])[response.uid]
            self._cache.keep(self.key, tokens, layers)
        return Step(row.id, read=response.progress)

    def _token(self, response: Any, routing: TokenRouting | None) -> Step:
        row, token = self._rows[response.uid], int(response.token)
        logprob = None
        if row.ask.top_logprobs is not None:
            logprob = logprob_of(token, response.logprobs, row.ask.top_logprobs)
        ended = response.finish_reason
        if ended is not None:
            if row.moved is None:  # otherwise it was made under two steerings, or more
                self._cache.keep(self.key, response.all_tokens, response.prompt_cache)
            del self._rows[response.uid]
        return Step(row.id, token, ended=ended, logprob=logprob, routing=routing)

    def count(self) -> None:
        self._model.uncounted.settle()

    def close(self) -> None:
        self._rows.clear()
        self._generator.close()
        self.count()


@dataclass(frozen=True, slots=True)
class DrawnOptions(GenerateOptions):
    """Options of an answer that names what draws its tokens."""

    drawing: AloneSampler = field(kw_only=True)


def drawing(options: DrawnOptions) -> AloneSampler:
    """What draws the tokens."""
    return options.drawing


@dataclass(slots=True)
class _Alone:
    id: int
    ask: Ask
    steps: Steps
    said: list[Step]


class AloneLane:
    """One request at a time, by the decoder: for models whose caches take no ragged batches.

    decoder: one whose sampler is `drawing`.
    """

    def __init__(self, decoder: Decoder, key: Key, observer: Observer) -> None:
        self.key = key
        self._observer = observer
        self._decoder = decoder
        self._current: _Alone | None = None

    def _process(self, ask: Ask) -> list[Processor]:
        tokenizer = self._decoder.tokenizer
        return processors_of(ask, tokenizer, self._observer.taps.anatomy.vocabulary)

    def __len__(self) -> int:
        return int(self._current is not None)

    @property
    def room(self) -> int:
        return 1 - len(self)

    def add(self, number: int, ask: Ask, moved: Moved | None = None) -> int:
        draws = AloneSampler(ask, self._process(ask))
        said: list[Step] = []

        def on_token(index: int, token: int, _text: str, experts: Any, weights: Any) -> None:
            row = draws.rows[index] if ask.top_logprobs is not None else None
            logprob = logprob_of(token, row, ask.top_logprobs or 0) if row is not None else None
            routing = None
            if experts is not None and self._observer.watch.due:
                self._observer.watch.saw({number: experts})
            if ask.routing and experts is not None:
                routing = TokenRouting(token, experts, weights)
            said.append(Step(number, token, logprob=logprob, routing=routing))

        options = DrawnOptions(ask.max_tokens, drawing=draws)
        cached = self._decoder.cached(self.key, ask.prompt)
        counter = self._observer.counter()
        steps = self._decoder.steps(ask.prompt, options, lambda: self.key, on_token, counter)
        self._current = _Alone(number, ask, steps, said)
        return cached

    def remove(self, number: int) -> None:
        if self._current is not None and self._current.id == number:
            self._current.steps.close()
            self._current = None

    def take_out(self, number: int) -> Moved | None:
        raise NotImplementedError("the chat of the shell is no client of this kind of lane")

    def step(self) -> list[Step]:
        current = self._current
        if current is None:
            return []
        decoded = advance(current.steps)
        found, current.said[:] = list(current.said), []
        if decoded is not None:
            self._current = None
            found.append(Step(current.id, ended=_reason(decoded)))
        if not found:
            total = len(current.ask.prompt)
            found.append(Step(current.id, read=(total, total)))
        return found

    def count(self) -> None:
        pass  # each token is counted when it is consumed

    def close(self) -> None:
        if self._current is not None:
            self.remove(self._current.id)


def _reason(decoded: Decoded) -> str:
    return "length" if decoded.finish_reason == "length" else "stop"


def logprob_of(token: int, logprobs: mx.array, top: int) -> TokenLogprob:
    """The log-probability of a token, and those of the `top` most likely ones, from [V]."""
    own = float(np.array(logprobs[token].astype(mx.float32)))
    top = min(top, logprobs.size - 1)
    if top == 0:
        return TokenLogprob(token, _finite(own))
    best = mx.argpartition(-logprobs, kth=top - 1)[:top]
    values = np.array(logprobs[best].astype(mx.float32))
    pairs = sorted(zip(np.array(best).tolist(), values.tolist(), strict=True), key=lambda p: -p[1])
    return TokenLogprob(token, _finite(own), tuple((int(t), _finite(v)) for t, v in pairs))


def _finite(value: float) -> float:
    """JSON holds no infinity; clients know -9999 for a token that cannot come."""
    return value if np.isfinite(value) else -9999.0
