"""Answers without a front end: `generate` and `stream_generate`, on models larger than memory too.

    from mlxfun import generate
    print(generate("org/large-moe-4bit", "What is a mortgage?", resident="auto"))

The names and arguments are those that users of mlx-lm and mlx-moe know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mlxfun.checkpoint.options import LoadOptions, Resident
from mlxfun.data.chat import prompt_tokens
from mlxfun.generation.decoder import advance
from mlxfun.generation.options import GenerateOptions
from mlxfun.session.session import Session

GREEDY = GenerateOptions()


def stream_generate(
    model: Session | str | Path,
    prompt: str,
    options: GenerateOptions = GREEDY,
    *,
    max_tokens: int | None = None,
    resident: Resident = "auto",
    capacity: int | None = None,
) -> Iterator[str]:
    """The text of an answer to `prompt`, piece by piece.

    model: an open session, which stays open and whose conversation is not changed, or what
    `Session.open` takes, which is opened for this answer. max_tokens: goes before that of the
    options. resident, capacity: how much of a model that is opened is held in memory, see LoadOptions.
    Raises what opening a session does.
    """
    if not isinstance(model, Session):
        held = LoadOptions(resident="all" if capacity else resident, capacity=capacity)
        session = Session.open(model, held)
        try:
            yield from stream_generate(session, prompt, options, max_tokens=max_tokens)
        finally:
            session.close()
        return
    if max_tokens is not None:
        options = replace(options, max_tokens=max_tokens)
    pieces: list[str] = []
    said = 0
    steps = model.answer_steps(_asked(model, prompt, options), options, pieces.append)
    while (decoded := advance(steps)) is None:
        yield from filter(None, pieces)
        said += sum(map(len, pieces))
        pieces.clear()
    # The rest, with what the tokenizer held back until it was sure of it.
    if decoded.text[said:]:
        yield decoded.text[said:]


def generate(
    model: Session | str | Path,
    prompt: str,
    options: GenerateOptions = GREEDY,
    *,
    max_tokens: int | None = None,
    resident: Resident = "auto",
    capacity: int | None = None,
) -> str:
    """The whole text of an answer, see `stream_generate`."""
    pieces = stream_generate(
        model,
        prompt,
        options,
        max_tokens=max_tokens,
        resident=resident,
        capacity=capacity,
    )
    return "".join(pieces)


def _asked(session: Session, prompt: str, options: GenerateOptions) -> list[int]:
    """The tokens of one question, by the model's chat template."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    return [int(t) for t in prompt_tokens(messages, session.tokenizer, options.thinking)]
