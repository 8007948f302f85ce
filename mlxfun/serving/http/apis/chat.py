"""POST /v1/chat/completions and /v1/completions, as OpenAI's clients speak them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from time import time
from typing import Any, Literal
from uuid import uuid4

from mlxfun.serving.ask import Ask, TokenLogprob, WishedSide
from mlxfun.serving.http.answers import Wording, event
from mlxfun.serving.http.apis.structured import grammar_of, with_calls
from mlxfun.serving.http.errors import Bad, openai_error
from mlxfun.serving.http.fields import Fields, quoted
from mlxfun.serving.http.flow import Delta, Part, Turn
from mlxfun.serving.http.ours import Extras, extras_of, extras_said
from mlxfun.serving.http.prompts import (
    Chat,
    chat_prompt,
    chosen_tools,
    messages_of,
    plain_prompt,
    tools_of,
)
from mlxfun.serving.http.sampling import TOP_LOGPROBS, limit_of, sampling_of, stops_of
from mlxfun.serving.http.tickets import Ticket
from mlxfun.serving.http.tools import ToolCall
from mlxfun.serving.options import ServeOptions
from mlxfun.serving.service import Card

Endpoint = Literal["chat", "text"]
SIDES: dict[str, WishedSide] = {"live": "live", "base": "base", "candidate": "candidate"}
ANY_MODEL = ("", "default", "default_model", "local")


def side_of(model: str | None, card: Card) -> WishedSide:
    """The side that `model` names. Raises Bad for a model that is not here."""
    if model is None or model in ANY_MODEL or model in (card.model, card.model.split("/")[-1]):
        return "live"
    side = SIDES.get(model)
    if side is None:
        raise Bad(
            f"there is no model {quoted(model)} here: name {card.model}, base or candidate, or "
            "leave it out",
            "model",
            404,
        )
    if side == "candidate" and all(name != side for name, _ in card.sides):
        raise Bad("there is no candidate: nothing is staged", "model", 409)
    return side


def limited(prompt: Sequence[int], options: ServeOptions, card: Card, asked: int) -> int:
    """How many tokens the answer may have. Raises Bad for a prompt that is too long."""
    most = options.max_input_tokens or card.context
    if most is not None and len(prompt) > most:
        raise Bad(
            f"the prompt has {len(prompt):,} tokens, more than the {most:,} that are accepted; "
            "shorten it",
            "messages",
            400,
        )
    return asked


def chat_turn(fields: Fields, card: Card, options: ServeOptions) -> Turn:
    """A chat completion as a request to the model. Raises Bad."""
    answers = answers_of(fields)
    tools, choice = chosen_tools(fields.raw("tool_choice"), tools_of(fields))
    one = not fields.switch("parallel_tool_calls", True)
    chat = Chat(
        messages_of(fields),
        tools,
        _thinking(fields),
        must_call=choice == "required",
        one_call=one,
    )
    side = side_of(fields.text("model"), card)
    ask = Ask(
        prompt=(),
        max_tokens=limit_of(fields, ("max_completion_tokens", "max_tokens"), options.max_tokens),
        sampling=sampling_of(fields, card.vocabulary),
        stop=stops_of(fields),
        side=side,
        top_logprobs=_top_logprobs(fields),
        grammar=grammar_of(fields, card),
    )
    ask = extras_of(fields, card).on(with_calls(ask, chat, card))
    prompt = chat_prompt(chat, card)
    most = limited(prompt.tokens, options, card, ask.max_tokens)
    ask = replace(ask, prompt=prompt.tokens, thinking=prompt.thinking, max_tokens=most)
    return Turn(ask, card.tokenizer, tools, answers)


def text_turn(fields: Fields, card: Card, options: ServeOptions) -> Turn:
    """A plain completion as a request to the model. Raises Bad."""
    answers = answers_of(fields)
    for name in ("suffix", "echo"):
        if fields.raw(name):
            raise fields.bad(name, "is not offered here: leave it out")
    prompt = plain_prompt(fields.need("prompt"), card)
    most = limit_of(fields, ("max_tokens", "max_completion_tokens"), options.max_tokens)
    ask = Ask(
        prompt=prompt.tokens,
        max_tokens=limited(prompt.tokens, options, card, most),
        sampling=sampling_of(fields, card.vocabulary),
        stop=stops_of(fields),
        side=side_of(fields.text("model"), card),
        top_logprobs=fields.integer("logprobs", 0, TOP_LOGPROBS, None),
        parts=False,
        grammar=grammar_of(fields, card),
    )
    return Turn(extras_of(fields, card).on(ask), card.tokenizer, answers=answers)


def answers_of(fields: Fields) -> int:
    """How many answers are asked for. Raises Bad."""
    if fields.integer("best_of", 1, 1 << 31, 1) != 1:
        raise fields.bad("best_of", "must be 1: use n, and choose yourself")
    return fields.integer("n", 1, MOST_ANSWERS, 1) or 1


def _thinking(fields: Fields) -> bool | None:
    """Whether thinking is switched on or off, None where the request does not say."""
    inner = fields.table("chat_template_kwargs")
    for where in (fields, inner):
        if where is not None and "enable_thinking" in where:
            return where.switch("enable_thinking")
    effort = fields.choice("reasoning_effort", EFFORTS, "")
    return None if not effort else effort != "none"


MOST_ANSWERS = 16
"""Answers to one request."""

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _top_logprobs(fields: Fields) -> int | None:
    if isinstance(fields.raw("logprobs"), int) and not isinstance(fields.raw("logprobs"), bool):
        return fields.integer("logprobs", 0, TOP_LOGPROBS, None)  # as mlx-lm's server takes it
    wanted = fields.switch("logprobs")
    top = fields.integer("top_logprobs", 0, TOP_LOGPROBS, None)
    if top and not wanted:
        raise Bad("top_logprobs needs logprobs: true", "top_logprobs")
    return (top or 0) if wanted else None


class OpenAIWording(Wording):
    """Words answers as `chat.completion` or `text_completion` objects.

    Each of several answers to one request has its own; `like` makes the others.
    """

    def __init__(self, endpoint: Endpoint, turn: Turn, card: Card, fields: Fields) -> None:
        self._endpoint, self._turn, self._card = endpoint, turn, card
        self._index = 0
        self._id = f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{uuid4().hex}"
        self._created = int(time())
        table = fields.table("stream_options")
        self._usage = table is not None and table.switch("include_usage")
        self._extras = Extras.of(turn.ask, card)
        self._calls = 0
        self._offset = 0
        self._ticket: Ticket | None = None
        self._tokens: int | None = None  # of the whole answer, once it is over

    def like(self, index: int) -> OpenAIWording:
        """The same for another answer of the request."""
        other = copy.copy(self)
        other._index = index
        return other

    # -- streams ---------------------------------------------------------------------------------

    def begin(self, ticket: Ticket) -> bytes:
        self._ticket = ticket
        if self._endpoint == "text":
            return b""
        first = {"role": "assistant", "content": ""}
        return event(self._chunk([self._choice(first)]) | extras_said(self._extras, ticket))

    def delta(self, delta: Delta) -> bytes:
        if delta.read is not None:
            return b""
        found = []
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        for part in delta.parts:
            found.append(self._chunk([self._choice(self._said(part), None, logprobs)]))
            logprobs = None
        if logprobs is not None:
            found.append(self._chunk([self._choice(self._said(Part("text")), None, logprobs)]))
        if delta.routing and found:
            found[-1] |= extras_said(self._extras, self._ticket, delta.routing)
        elif delta.routing:
            empty = self._choice(self._said(Part("text")))
            found.append(
                self._chunk([empty]) | extras_said(self._extras, self._ticket, delta.routing)
            )
        if delta.reason is None:
            return b"".join(map(event, found))
        last = self._choice(
            {} if self._endpoint == "chat" else {"text": ""}, self._reason(delta.reason)
        )
        found.append(self._chunk([last]) | extras_said(self._extras, self._ticket))
        self._tokens = delta.tokens
        return b"".join(map(event, found))

    def end(self) -> bytes:
        return self.end_of([self])

    def end_of(self, answers: Sequence[OpenAIWording]) -> bytes:
        """The last events of a stream of several answers."""
        tokens = sum(answer._tokens or 0 for answer in answers)
        usage = self._chunk([]) | {"usage": self._spent(tokens)}
        return (event(usage) if self._usage else b"") + b"data: [DONE]\n\n"

    def failed(self, problem: Bad) -> bytes:
        return event(openai_error(problem.status, problem.message, problem.param))

    def _said(self, part: Part) -> dict[str, Any]:
        if self._endpoint == "text":
            return {"text": part.text}
        if part.call is not None:
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1} | call_json(part.call)]}
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}

    def _choice(
        self, said: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        held = said if self._endpoint == "text" else {"delta": said}
        return {"index": self._index, **held, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._endpoint == "chat" else "text_completion"
        return self._object(kind, choices)

    # -- whole answers ---------------------------------------------------------------------------

    def whole(self, delta: Delta, ticket: Ticket) -> dict[str, Any]:
        self._ticket = ticket
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        self._calls = len(delta.calls)
        reason = self._reason(delta.reason or "stop")
        said: dict[str, Any] = {"text": delta.joined("text")}
        if self._endpoint == "chat":
            said = {"message": self._message(delta)}
        choice = {"index": self._index, **said, "logprobs": logprobs, "finish_reason": reason}
        kind = "chat.completion" if self._endpoint == "chat" else "text_completion"
        found = self._object(kind, [choice]) | {"usage": self._spent(delta.tokens)}
        return found | extras_said(self._extras, ticket, delta.routing)

    def _message(self, delta: Delta) -> dict[str, Any]:
        text, reasoning = delta.joined("text"), delta.joined("reasoning")
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if not delta.calls:
            message["content"] = text
        else:
            message["tool_calls"] = [call_json(call) for call in delta.calls]
        if reasoning:
            message["reasoning_content"] = reasoning
        return message

    # -- both ------------------------------------------------------------------------------------

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        admitted = self._ticket.admitted if self._ticket is not None else None
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._card.model,
            "system_fingerprint": admitted.state if admitted is not None else None,
            "choices": choices,
        }

    def _reason(self, reason: str) -> str:
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _spent(self, tokens: int) -> dict[str, Any]:
        prompt = len(self._turn.ask.prompt)
        admitted = self._ticket.admitted if self._ticket is not None else None
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": admitted.cached_tokens if admitted else 0},
        }

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._endpoint == "chat":
            return {"content": [self._token(one) for one in found]}
        words = [self._word(one.token) for one in found]
        offsets = []
        for word in words:
            offsets.append(self._offset)
            self._offset += len(word)
        top = [{self._word(t): value for t, value in one.top} for one in found]
        return {
            "tokens": words,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }

    def _token(self, one: TokenLogprob) -> dict[str, Any]:
        return self._named(one.token, one.logprob) | {
            "top_logprobs": [self._named(token, value) for token, value in one.top]
        }

    def _named(self, token: int, value: float) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": value, "bytes": list(word.encode())}

    def _word(self, token: int) -> str:
        return self._turn.tokenizer.decode([token])


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
