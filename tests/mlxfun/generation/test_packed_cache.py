"""Quantised KV caches: alone, in a batch and from the cache of prompts they give one answer, and a
model that cannot have them says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from desk_rigs import PROMPTS, Desk, plain, tokens_of
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions, PackedCache
from mlxfun.errors import ModelError, UsageError
from mlxfun.generation import packed_cache
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.packed_cache import PackedKVCache
from tests.mlxfun import tiny_checkpoints

KV = PackedCache(8, 32)


def opened(path: Path | str, kv: PackedCache) -> Session:
    return Session.open(path, LoadOptions(kv=kv))


@pytest.fixture(scope="module")
def demo() -> Any:
    session = opened("demo", KV)
    yield session
    session.close()


def by_hand(session: Session, prompt: tuple[int, ...], count: int, kv: PackedCache) -> list[int]:
    """Greedy tokens by plain forwards with mlx-lm's quantised caches from `kv.start` tokens on."""
    cache: list[Any] = make_prompt_cache(session.model)
    found: list[int] = []
    tokens = mx.array([prompt])
    for _ in range(count):
        if cache[0].offset >= kv.start:
            cache = [
                c if hasattr(c, "bits") else
                c.to_quantized(group_size=kv.group_size, bits=kv.bits) if c.offset
                else QuantizedKVCache(kv.group_size, kv.bits)
                for c in cache
            ]  # fmt: skip
        tokens = mx.argmax(session.model(tokens, cache=cache)[:, -1:], axis=-1)
        found.append(int(tokens.item()))
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_chat_answers_as_mlx_lm_does(bits: int) -> None:
    for start in (0, 20):
        kv = PackedCache(bits, 32, start)
        session = opened("demo", kv)
        prompt = PROMPTS[3]
        found = session.greedy(list(prompt), GenerateOptions(max_tokens=12))
        expected = by_hand(session, prompt, 12, kv)
        assert list(found.tokens) == expected[: len(found.tokens)]
        assert packed_cache.packed(session._decoder._caches._kept[0].layers)
        session.close()


def test_each_answer_of_a_batch_is_that_of_the_prompt_alone(demo: Session) -> None:
    desk = Desk(demo, concurrency=4)
    assert desk.scheduler.batched
    numbers = [desk.ask(plain(prompt, 8 + n)) for n, prompt in enumerate(PROMPTS)]
    desk.run()
    for number, prompt in zip(numbers, PROMPTS, strict=True):
        expected = by_hand(demo, prompt, 8 + number, KV)
        if 2 not in expected:
            assert tokens_of(desk, number) == expected
    # And again, from the cache of prompts.
    again = [desk.ask(plain(prompt, 8)) for prompt in PROMPTS]
    desk.run()
    assert desk.totals.cached_tokens > 40
    for first, second in zip(numbers, again, strict=True):
        assert tokens_of(desk, second) == tokens_of(desk, first)[:8]


def test_the_cache_of_prompts_counts_packed_bytes(demo: Session) -> None:
    whole = Session.open("demo")
    held = []
    for session in (whole, demo):
        desk = Desk(session)
        desk.ask(plain(PROMPTS[1], 4))
        desk.run()
        (kept,) = desk.scheduler._cache._kept
        arrays = [a for c in kept.layers for x in (c.keys, c.values) for a in _flat(x)]
        assert desk.scheduler.cache_bytes == sum(a.nbytes for a in arrays)
        held.append(desk.scheduler.cache_bytes / kept.layers[0].offset)
    assert isinstance(kept.layers[0], PackedKVCache)
    assert held[1] < 0.7 * held[0]
    whole.close()


def _flat(held: Any) -> list[mx.array]:
    return list(held) if isinstance(held, tuple) else [held]


def test_a_batch_is_the_rows_it_was_made_of() -> None:
    rng = np.random.default_rng(0)

    def filled(length: int) -> PackedKVCache:
        cache = PackedKVCache(32, 8)
        if length:
            keys, values = (mx.array(rng.normal(size=(1, 2, length, 64))) for _ in range(2))
            cache.update_and_fetch(keys.astype(mx.float32), values.astype(mx.float32))
        return cache

    rows = [filled(length) for length in (5, 0, 300)]
    more = [filled(length) for length in (7, 260)]
    batch = PackedKVCache.merge(copy.deepcopy(rows))
    batch.extend(PackedKVCache.merge(copy.deepcopy(more)))
    batch.filter([0, 2, 3, 4])
    kept = [rows[0], rows[2], *more]
    for step in range(3):
        new = [mx.array(rng.normal(size=(4, 2, 1, 64)).astype(np.float32)) for _ in range(2)]
        batch.update_and_fetch(*new)
        for row, cache in enumerate(kept):
            cache.update_and_fetch(new[0][row : row + 1], new[1][row : row + 1])
        if step == 1:
            batch.filter([0, 1, 2])
            kept = kept[:3]
            rng = np.random.default_rng(1)
            break
    batch.filter([0, 2])  # the padding of the longest goes away
    for row, cache in enumerate([kept[0], kept[2]]):
        found = batch.extract(row)
        assert found.offset == cache.offset
        for one, other in zip(found.keys_and_values(), cache.keys_and_values(), strict=True):
            for a, b in zip(one, other, strict=True):
                assert mx.array_equal(a[..., : cache.offset, :], b)


@pytest.mark.parametrize(
    ("family", "said"), [("gpt_oss", "RotatingKVCache"), ("qwen3_moe", "leave --kv-bits out")]
)
def test_a_model_with_other_caches_is_refused(family: str, said: str, tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_models.CONFIGS[family])
    config.get("text_config", config)["vocab_size"] = 4096
    tiny_checkpoints.write(tmp_path, config, dtype=mx.float32)
    with pytest.raises(ModelError, match=rf"--kv-.*{said}"):
        opened(tmp_path, KV)


def test_what_cannot_be_divided_is_refused_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"--kv-group-size 128.*give --kv-group-size 32"):
        opened("demo", PackedCache(8, 128))
    for bad in ({"bits": 3}, {"bits": 4, "group_size": 7}, {"bits": 4, "start": -1}):
        with pytest.raises(UsageError, match="--kv-"):
            PackedCache(**bad)


def test_a_late_start_is_answered_one_at_a_time(demo: Session) -> None:
    kv = PackedCache(8, 32, 25)
    session = opened("demo", kv)
    desk = Desk(session)
    assert not desk.scheduler.batched
    numbers = [desk.ask(plain(PROMPTS[n], 10)) for n in (3, 3)]
    desk.run()
    for number in numbers:
        assert tokens_of(desk, number) == by_hand(session, PROMPTS[3], 10, kv)
    session.close()
