"""What is queued ahead is dropped when the model changes between two tokens, in every family.

The reference is a loop that feeds one token after the other and queues nothing ahead.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from decoding_rigs import DRAWN, PROMPT, SIDES, Pair, Tokenizer
from mlx_lm.models.cache import make_prompt_cache

from mlxfun.generation.decoder import Decoder, advance
from mlxfun.generation.kv_cache import KVCache
from mlxfun.generation.sampling import Sampler
from tests.families import spread

CHANGES = (1, 2, 5)
"""Before the tokens of these numbers the model is swapped for its other state."""


def one_by_one(pair: Pair) -> tuple[list[int], list[np.ndarray]]:
    """Tokens, and the experts [L, K] by which each was consumed, sorted."""
    model, sampler = pair.r.model, Sampler(DRAWN)
    cache = make_prompt_cache(model)
    pair.go(SIDES[0])
    token = sampler(model(mx.array([PROMPT]), cache=cache)[:, -1])
    tokens: list[int] = []
    routed: list[np.ndarray] = []
    for index in range(DRAWN.max_tokens):
        if index in CHANGES:
            pair.go(other(pair.live))
        tokens.append(token.item())
        if index + 1 == DRAWN.max_tokens:
            break
        with pair.r.taps.recording(norms=False) as recording:
            logits = model(token[:, None], cache=cache)[:, -1]
            records = [forwards[-1] for forwards in recording.drain()]
            mx.eval(logits, *(r.weights for r in records))
        experts = np.full((len(records), pair.r.anatomy.top_k), -1)
        for row, record in enumerate(records):
            chosen = np.array(record.indices).astype(np.int32).reshape(-1)
            used = np.array(record.weights.astype(mx.float32)).reshape(-1) != 0
            experts[row, : chosen.size] = np.where(used, chosen, -1)
        routed.append(np.sort(experts))
        token = sampler(logits)
    return tokens, routed


def other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_a_change_acts_on_the_next_token_as_if_nothing_had_been_queued(rig, name: str) -> None:
    pair = Pair(rig(name))
    tokens, routed = one_by_one(pair)
    pair.go(SIDES[0])
    decoder = Decoder(pair.r.model, Tokenizer(), pair.r.taps)
    heard: list[tuple[int, Any]] = []
    steps = decoder.steps(
        PROMPT,
        DRAWN,
        lambda: (pair.live, ""),
        lambda index, token, text, experts, weights: heard.append((token, experts)),
    )
    advance(steps)
    for index in range(DRAWN.max_tokens):
        if index in CHANGES:
            pair.go(other(pair.live))
        advance(steps)
    assert [token for token, _ in heard] == tokens
    seen = [np.sort(experts) for _, experts in heard if experts is not None]
    assert len(seen) == len(routed)
    for mine, plain in zip(seen, routed, strict=True):
        np.testing.assert_array_equal(mine, plain)


def test_a_ring_that_has_wrapped_is_taken_back_bit_for_bit() -> None:
    from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache

    mx.random.seed(1)
    ring, state = RotatingKVCache(max_size=4, keep=0), ArraysCache(1)
    cache = KVCache(("a", ""), [], [CacheList(ring, state)])
    for _ in range(6):
        ring.update_and_fetch(mx.random.normal((1, 1, 1, 2)), mx.random.normal((1, 1, 1, 2)))
    state[0] = mx.array([1.0, 2.0])
    before = [np.array(a) for a in (ring.keys, ring.values, state[0])]
    offset = ring.offset
    cache.begin_step()
    ring.update_and_fetch(mx.ones((1, 1, 1, 2)), mx.ones((1, 1, 1, 2)))
    state[0] = state[0] * 2
    mx.eval(ring.keys, state[0])
    cache.take_back()
    for array, was in zip((ring.keys, ring.values, state[0]), before, strict=True):
        np.testing.assert_array_equal(np.array(array), was)
    assert ring.offset == offset
