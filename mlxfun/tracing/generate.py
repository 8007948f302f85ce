"""Answers of a model while values are saved and changed in each of its forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlxfun.context import SILENT, Context
from mlxfun.errors import UsageError
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.names import Point
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.run import Run
from mlxfun.tracing.values import Saved

PREFILL_STEP = 2048


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer. tokens: its ids, without the one that ends it; prompt: those it answers."""

    text: str
    tokens: tuple[int, ...]
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the most probable one."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    parts: Parts,
    prompt: Sequence[int],
    edits: Sequence[tuple[Point, Intervention]],
    saved: Sequence[Saved],
    sampling: Sampling,
    ctx: Context = SILENT,
) -> Generated:
    """Continue token ids. Edits act in every forward, of the prompt and of each token.

    Positions count through prompt and answer, negative ones from the end of the prompt. Saved
    values have one entry for each forward that has their positions.
    """
    if sampling.max_tokens < 1:
        raise UsageError(f"max_tokens {sampling.max_tokens} must be at least 1")
    mx.random.seed(sampling.seed)
    draw = make_sampler(sampling.temperature, top_p=sampling.top_p)
    ends, out = set(parts.tokenizer.eos_token_ids), list[int]()
    cache = make_prompt_cache(parts.model)
    rest = list(prompt)
    with Run(parts, edits, saved, prompt=len(prompt)) as run:
        while True:
            chunk, rest = rest[:PREFILL_STEP], rest[PREFILL_STEP:]
            ctx.check()
            logits = parts.forward(mx.array([chunk]), cache)[:, -1]
            # Evaluated forward by forward: else every value would keep its whole graph alive.
            mx.eval(logits, [one.arrays() for one in saved])
            if rest:
                continue
            log = logits.astype(mx.float32)
            drawn: Any = draw(log - mx.logsumexp(log, axis=-1, keepdims=True))
            token = int(drawn.item())
            if token in ends:
                break
            out.append(token)
            if len(out) == sampling.max_tokens:
                break
            rest = [token]
    run.require_reached()
    for one in saved:
        one.finish(evaluated=True)
    return Generated(parts.tokenizer.decode(out), tuple(out), tuple(prompt))
