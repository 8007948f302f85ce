"""The sampling fields of a request, by OpenAI's names and those that local servers add."""

from __future__ import annotations

from mlxfun.serving.ask import Sampling
from mlxfun.serving.http.errors import Bad
from mlxfun.serving.http.fields import Fields, quoted

STOPS, STOP_CHARACTERS = 16, 512
BIASES = 1024
SEEDS = 1 << 64
TOP_LOGPROBS = 20
CONTEXT = 4096


def sampling_of(fields: Fields, vocabulary: int | None, temperature: float = 0.0) -> Sampling:
    """How tokens are drawn. Raises Bad. temperature: where the request does not say."""
    seed = fields.integer("seed", -(1 << 63), SEEDS - 1, None)
    top_k = fields.integer("top_k", -1, 1 << 31, 0) or 0
    context = fields.integer("repetition_context_size", 1, CONTEXT, 20)
    return Sampling(
        temperature=fields.number("temperature", 0, 2, temperature),
        top_p=_above_zero(fields, "top_p"),
        top_k=0 if top_k < 0 or (vocabulary is not None and top_k >= vocabulary) else top_k,
        min_p=fields.number("min_p", 0, 1, 0),
        seed=None if seed is None else seed % SEEDS,
        logit_bias=_bias(fields, vocabulary),
        repetition_penalty=_penalty(fields),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0),
        context=context or 20,
    )


def _above_zero(fields: Fields, name: str) -> float:
    # 0 is what clients send for "the most likely token only".
    return max(fields.number(name, 0, 1, 1), 1e-6)


def _penalty(fields: Fields) -> float:
    value = fields.number("repetition_penalty", 0, 100, 1)
    if value == 0:
        raise fields.bad("repetition_penalty", "must be above 0; 1 changes nothing")
    return value


def _bias(fields: Fields, vocabulary: int | None) -> tuple[tuple[int, float], ...]:
    table = fields.table("logit_bias")
    if table is None:
        return ()
    if len(table.values) > BIASES:
        raise Bad(
            f"logit_bias has {len(table.values):,} entries, at most {BIASES:,} are read",
            "logit_bias",
        )
    found = []
    for word in table.values:
        plain = word.isascii() and word.isdecimal() and len(word) < 12
        if not plain or (vocabulary is not None and int(word) >= vocabulary):
            known = f"0 to {vocabulary - 1:,}" if vocabulary is not None else "whole numbers"
            raise Bad(f"logit_bias: {quoted(word)} is no token; they are {known}", "logit_bias")
        found.append((int(word), table.number(word, -100, 100, 0)))
    return tuple(found)


def stops_of(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """The texts that end the answer."""
    value = fields.raw(name)
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(stop, str) for stop in given):
        raise fields.bad(name, "must be a text or a list of texts")
    if len(given) > STOPS:
        raise Bad(f"{name} has {len(given):,} entries, at most {STOPS} are read", name)
    for stop in given:
        if len(stop) > STOP_CHARACTERS:
            raise Bad(f"{name}: a stop text has at most {STOP_CHARACTERS} characters", name)
    return tuple(stop for stop in given if stop)


def limit_of(fields: Fields, names: tuple[str, ...], default: int) -> int:
    """How many tokens the answer may have: the first of `names` that is given."""
    for name in names:
        if name in fields:
            return fields.integer(name, 1, 1 << 24, default) or default
    return default
