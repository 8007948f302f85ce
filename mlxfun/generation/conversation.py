"""A multi-turn conversation with the live weights of an edited model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Message, Tokenizer, prompt_tokens
from mlxfun.editing.editor import Editor
from mlxfun.errors import StateError, UsageError
from mlxfun.events import Side, Token
from mlxfun.generation.decoder import Counter, Decoded, Decoder, OnToken
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ChatReport, TokensReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlxfun.arrays import Array


class AnsweredElsewhere(Protocol):
    """Answers in place of the decoder, where requests of others are answered too. It counts its
    forwards, and lets waiting jobs take their turn between two tokens."""

    def __call__(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        side: Side,
        on_token: OnToken,
        ctx: Context,
    ) -> Decoded:
        """An answer; a cancel ends it at the token reached."""


class Conversation:
    """Messages so far, and answers by whichever side is live (or is asked for).

    elsewhere: what answers, None for the decoder.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoder: Decoder, editor: Editor, context: int | None = None
    ) -> None:
        """context: tokens that the model's context holds, None if that is not known."""
        self._tokenizer = tokenizer
        self._context = context
        self._decoder = decoder
        self._editor = editor
        self._messages: list[Message] = []
        self._taken: list[Message] = []
        self.elsewhere: AnsweredElsewhere | None = None

    def reset(self) -> None:
        """Forget the turns; caches stay, they are valid for what they hold."""
        self._taken, self._messages = self._messages, []

    def take_back(self, count: int) -> str:
        """Forget the last `count` questions with their answers; the text of the first of them.

        Raises StateError, and forgets nothing, when there are fewer.
        """
        asked = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        if not 1 <= count <= len(asked):
            raise StateError(
                f"the conversation has {len(asked)} question{'' if len(asked) == 1 else 's'} to "
                f"take back, not {count}"
            )
        first = asked[-count]
        self._taken = self._messages[first:]
        del self._messages[first:]
        return str(self._taken[0]["content"])

    def give_back(self) -> None:
        """Undo the last `take_back` or `reset`, for an answer that could not be given after it."""
        self._messages += self._taken
        self._taken = []

    def answer(
        self, text: str, options: GenerateOptions, counter: Counter | None, ctx: Context = SILENT
    ) -> ChatReport:
        """Answer one more turn. A cancelled question is no part of the conversation.

        Raises UsageError if there is no text, or if the conversation with it is longer than the
        model's context; the conversation stays as it was.
        """
        if not text.strip():
            raise UsageError("nothing was said; give a text to answer")
        asked = self._asked(text, options)
        prompt = prompt_tokens(asked, self._tokenizer, options.thinking)
        self._require_room(len(prompt), bool(self._messages))
        side = _side(options.side, self._editor)
        decoded = self._decode([int(t) for t in prompt], options, side, counter, ctx)
        if decoded.finish_reason != "cancelled":
            self._messages = [*asked, {"role": "assistant", "content": decoded.text}]
        return ChatReport(
            prompt=text,
            text=decoded.text,
            side=side,
            prompt_tokens=len(prompt),
            cached_tokens=decoded.cached_tokens,
            generated_tokens=len(decoded.tokens),
            tokens_per_second=len(decoded.tokens) / max(decoded.seconds, 1e-9),
            finish_reason=decoded.finish_reason,
        )

    def count(self, text: str, options: GenerateOptions) -> TokensReport:
        """The tokens of `text`, alone and as the next question of the conversation."""
        prompt = prompt_tokens(self._asked(text, options), self._tokenizer, options.thinking)
        before = prompt_tokens(self._messages, self._tokenizer) if self._messages else ()
        alone = self._tokenizer.encode(text, add_special_tokens=False)
        return TokensReport(len(alone), len(before), len(prompt), self._context)

    def _asked(self, text: str, options: GenerateOptions) -> list[Message]:
        """The messages of the conversation with `text` as the next question."""
        system = [{"role": "system", "content": options.system}] if options.system else []
        # An empty system prompt drops the one so far, none at all keeps it.
        silent = options.system is None
        turns = [m for m in self._messages if m["role"] != "system" or silent]
        return [*system, *turns, {"role": "user", "content": text}]

    def _require_room(self, tokens: int, turns: bool) -> None:
        """Raise UsageError for a prompt that is longer than the model's context."""
        if self._context is None or tokens < self._context:
            return
        what = "the conversation with this question" if turns else "the question"
        remedy = "start a new conversation (chat --new) or shorten it" if turns else "shorten it"
        raise UsageError(
            f"{what} has {tokens:,} tokens, and the model's context is {self._context:,}: {remedy}"
        )

    def _decode(
        self,
        prompt: list[int],
        options: GenerateOptions,
        side: Side,
        counter: Counter | None,
        ctx: Context,
    ) -> Decoded:
        def on_token(
            index: int, token: int, text: str, experts: Array | None, weights: Array | None
        ) -> None:
            ctx.emit(Token(0, side, index, token, text, experts, weights))

        if self.elsewhere is not None:
            return self.elsewhere(prompt, options, side, on_token, ctx)
        with self._editor.live(side):
            key = self._editor.key
            return self._decoder.run(prompt, options, key, on_token, counter, ctx)


def _side(wish: str, editor: Editor) -> Side:
    """The editor's name for "live", "base" or "candidate"."""
    if wish not in ("live", "base", "candidate"):
        raise UsageError(f"no side {wish!r}; choose live, base or candidate")
    if wish == "live":
        wish = editor.side
    if wish == "candidate":
        editor.require_staged("chat with")
        return "candidate"
    return "base"
