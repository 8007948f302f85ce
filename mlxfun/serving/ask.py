"""What the HTTP side and the model's thread tell each other: plain data, nothing of MLX in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlxfun.events import Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlxfun.arrays import Array

WishedSide = Literal["live", Side]
"""Which side answers: the one that is live when the request is admitted, or a named one."""

Kind = Literal["text", "reasoning", "tool"]
"""What a piece of an answer is: for the reader, thinking before it, or the text of a tool call."""

EndReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: a stop token or stop text, `max_tokens`, or the client's going away."""

Levels = tuple[tuple[int, tuple[int, ...]], ...]
"""Experts by decoder layer: ((layer, experts), ...)."""


@dataclass(frozen=True, slots=True)
class SteerWish:
    """Experts that one request forces on or off, in addition to the steering in force."""

    activate: Levels = ()
    deactivate: Levels = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; checked by the HTTP side, see `mlxfun.serving.http.sampling`.

    top_k, min_p: 0 for off. seed: None draws one. logit_bias: ((token, what is added), ...).
    repetition_penalty: 1 for off; presence and frequency penalties: 0 for off. context: how many of
    the last tokens, prompt included, the penalties look at.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    context: int = 20


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of tools that an answer must consist of. schema: a JSON schema of what stands between the
    markers, as text, "" where that is left to the model. begin, end: the tokens of the markers.
    several: whether another may follow."""

    schema: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    several: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, checked. prompt: token ids.

    stop: texts that end the answer and are no part of it. top_logprobs: None for no
    log-probabilities, 0 for those of the tokens alone. parts: whether thinking and tool calls are
    told from text. tools: whether tool calls are looked for. thinking: whether the prompt has opened
    a thinking block. routing: whether the experts of each token are wanted. grammar: a JSON schema,
    as text, that the answer must follow. calls: the calls that it must be. one_call: whether the first call
    ends it. group: a number that requests for several answers to one prompt share, 0 for none: one of
    them reads the prompt, and the others go on from its cache.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    side: WishedSide = "live"
    steer: SteerWish | None = None
    top_logprobs: int | None = None
    parts: bool = True
    tools: bool = False
    thinking: bool = False
    routing: bool = False
    grammar: str | None = None
    calls: Calls | None = None
    one_call: bool = False
    group: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """Base class of what the model's thread says about a request."""


@dataclass(frozen=True, slots=True)
class Admitted(Frame):
    """The request is in a batch. state: of the weights that all of the answer comes from; steering:
    identity of the steering, "" for none. cached_tokens: of the prompt, taken from the cache."""

    state: str
    steering: str
    side: Side
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Reading(Frame):
    """How many tokens of the prompt have been read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability, and those of the most likely tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """The experts that served the forward which consumed a token: int32 [L, K], -1 where unused,
    and the weights they were applied with, float32 [L, K]."""

    token: int
    experts: Array
    weights: Array


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer. One of another kind between two tool pieces parts two calls."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Said(Frame):
    """One token more, and what of the text is certain by now."""

    token: int
    pieces: tuple[Piece, ...]
    logprob: TokenLogprob | None = None
    routing: TokenRouting | None = None


@dataclass(frozen=True, slots=True)
class Ended(Frame):
    """The answer is over. pieces: the rest of the text. stop: the stop text that ended it."""

    reason: EndReason
    pieces: tuple[Piece, ...]
    completion_tokens: int
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed(Frame):
    """There is no answer. status: for HTTP; message: one sentence."""

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Figures:
    """How the server does. in_flight: requests in a batch; waiting: accepted, not in one yet.

    tokens are counts since the start. cache_bytes: held for later prompts. by_status: answers by
    outcome.
    """

    in_flight: int = 0
    waiting: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cache_bytes: int = 0
    steps: int = 0
    by_outcome: Mapping[str, int] = field(default_factory=dict)
