"""The scheduler without HTTP: every answer is the one its prompt gets alone, in every kind of model;
caches, failures and clients that go away."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from desk_rigs import PROMPTS, Desk, plain, tokens_of
from mlx_lm.models.cache import make_prompt_cache

from mlxfun import Session
from mlxfun.context import SILENT, Context
from mlxfun.errors import Cancelled
from mlxfun.serving import lane_set, lanes
from mlxfun.serving.ask import (
    Admitted,
    Ended,
    Failed,
    Reading,
    Said,
    SteerWish,
)
from tests.mlxfun import tiny_checkpoints

FAMILIES = ("qwen3_moe", "gpt_oss", "lfm2_moe", "llama4", "deepseek_v3", "dbrx")


@pytest.fixture(scope="module", params=FAMILIES)
def session(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Session]:
    config = copy.deepcopy(tiny_models.CONFIGS[request.param])
    config.get("text_config", config)["vocab_size"] = 4096
    path: Path = tmp_path_factory.mktemp(request.param)
    tiny_checkpoints.write(path, config, dtype=mx.float32)
    found = Session.open(path)
    yield found
    found.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Session]:
    found = Session.open("demo")
    yield found
    found.close()


def alone(session: Session, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens by plain forwards of one prompt."""
    cache, found = make_prompt_cache(session.model), []
    tokens = mx.array([prompt])
    for _ in range(count):
        tokens = mx.argmax(session.model(tokens, cache=cache)[:, -1:], axis=-1)
        found.append(int(tokens.item()))
    return found


def test_each_answer_is_that_of_the_prompt_alone(session: Session) -> None:
    desk = Desk(session, concurrency=4)
    numbers = [desk.ask(plain(prompt, 8)) for prompt in PROMPTS]
    desk.run()
    for number, prompt in zip(numbers, PROMPTS, strict=True):
        expected = alone(session, prompt, 8)
        if 2 in expected:
            continue
        assert tokens_of(desk, number) == expected
        assert desk.last(number).reason == "length"
        assert desk.last(number).completion_tokens == 8


def test_a_conversation_goes_on_from_the_cache_and_says_the_same(session: Session) -> None:
    desk = Desk(session, concurrency=4)
    prompt = PROMPTS[1]
    desk.ask(plain(prompt, 6))
    desk.run()
    answer = tokens_of(desk, 0)
    longer = (*prompt, *answer, *PROMPTS[3])
    desk.ask(plain(longer, 6))
    desk.run()
    cached = desk.frames[1][0].cached_tokens
    assert cached >= len(prompt) - lanes.TAIL
    fresh = Desk(session, concurrency=4)
    fresh.ask(plain(longer, 6))
    fresh.run()
    assert fresh.frames[0][0].cached_tokens == 0
    assert tokens_of(desk, 1) == tokens_of(fresh, 0)
    # The first prompt's cache is still what it was: nothing was written through to it.
    desk.ask(plain(prompt, 6))
    desk.run()
    assert tokens_of(desk, 2) == answer
    # And neither is that of the longer one, which was shortened for it.
    desk.ask(plain(longer, 6))
    desk.run()
    assert tokens_of(desk, 3) == tokens_of(fresh, 0)


def test_caches_hold_no_more_than_their_budget(demo: Session) -> None:
    desk = Desk(demo, cache_bytes=200_000)
    for prompt in PROMPTS:
        desk.ask(plain(prompt, 8))
    desk.run()
    assert 0 < desk.scheduler.cache_bytes <= 200_000
    none = Desk(demo, cache_bytes=0)
    for _ in range(2):
        none.ask(plain(PROMPTS[1], 4))
        none.run()
    assert none.scheduler.cache_bytes == 0
    assert none.frames[1][0].cached_tokens == 0


def test_kept_caches_hold_no_batch_that_they_came_from(demo: Session) -> None:
    gc.collect()
    before = mx.get_active_memory()
    desk = Desk(demo, cache_bytes=500_000)
    for n in range(24):
        desk.ask(plain((5 + n, *PROMPTS[1]), 40))
    desk.run()
    desk.scheduler.settle(SILENT)
    mx.synchronize()
    gc.collect()
    assert mx.get_active_memory() - before < desk.scheduler.cache_bytes + 100_000


def test_a_long_prompt_is_read_in_parts_while_others_are_answered(
    demo: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "CPU_PREFILL", 32)
    monkeypatch.setattr(lanes, "GPU_PREFILL", 32)
    desk = Desk(demo)
    first = desk.ask(plain(PROMPTS[0], 30))
    desk.scheduler.step()
    long = desk.ask(plain(tuple(PROMPTS[1] * 6), 4))
    seen = []
    while not any(isinstance(f, Said) for f in desk.frames[long]):
        before = len(desk.frames[first])
        desk.scheduler.step()
        seen.append(len(desk.frames[first]) - before)
    parts = [f.done for f in desk.frames[long] if isinstance(f, Reading)]
    assert parts[0] == 32
    assert parts[-1] == 240
    assert sum(seen) >= 7  # the other one went on meanwhile
    desk.run()


def test_a_client_that_goes_away_gives_its_slot_to_the_next(demo: Session) -> None:
    desk = Desk(demo, concurrency=1)
    first, second = (desk.ask(plain(PROMPTS[0], 50)) for _ in range(2))
    for _ in range(5):
        desk.scheduler.step()
    assert not desk.frames[second]
    desk.gone.append(first)
    said = len(desk.frames[first])
    desk.scheduler.step()
    assert isinstance(desk.frames[second][0], Admitted)
    desk.run()
    assert len(desk.frames[first]) == said
    assert desk.totals.outcomes == {"cancelled": 1, "length": 1}


def test_a_step_that_fails_fails_its_requests_and_no_later_one(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(session)
    numbers = [desk.ask(plain(prompt, 30)) for prompt in PROMPTS[:3]]
    for _ in range(4):
        desk.scheduler.step()

    def broken(*_: Any) -> Any:
        raise RuntimeError("[matmul] out of luck")

    with monkeypatch.context() as patch:
        kind = lanes.BatchLane if desk.scheduler.batched else lanes.AloneLane
        patch.setattr(kind, "step", broken)
        desk.scheduler.step()
    failed = [n for n in numbers if any(isinstance(f, Failed) for f in desk.frames[n])]
    assert failed == (numbers if desk.scheduler.batched else numbers[:1])
    assert desk.last(failed[0]).status == 500
    assert "RuntimeError: [matmul] out of luck" in desk.last(failed[0]).message
    again = desk.ask(plain(PROMPTS[0], 8))
    desk.run()
    assert tokens_of(desk, again) == alone(session, PROMPTS[0], 8)


def test_what_was_edited_behind_its_back_is_no_answer(demo: Session) -> None:
    from mlxfun.steering.options import SteerOptions

    desk = Desk(demo)
    number = desk.ask(plain(PROMPTS[0], 30))
    for _ in range(4):
        desk.scheduler.step()
    demo.steer(SteerOptions(deactivate={demo.anatomy.indices[0]: (0,)}))
    try:
        desk.scheduler.step()
        assert desk.last(number).status == 500
        assert "edited" in desk.last(number).message
    finally:
        demo.steer(SteerOptions(clear=True))


def test_a_borrowed_model_is_left_alone_until_it_is_back(demo: Session) -> None:
    desk = Desk(demo)
    number = desk.ask(plain(PROMPTS[0], 12))
    for _ in range(4):
        desk.scheduler.step()
    before = len(desk.frames[number])
    from mlxfun.steering.options import SteerOptions

    demo.steer(SteerOptions(deactivate={demo.anatomy.indices[0]: (0,)}))
    desk.scheduler.step(borrowed=True)
    assert len(desk.frames[number]) == before
    demo.undo()
    desk.run()
    assert tokens_of(desk, number) == alone(demo, PROMPTS[0], 12)


def test_lanes_of_steered_requests_do_not_pile_up(demo: Session) -> None:
    desk = Desk(demo)
    layer = demo.anatomy.indices[0]
    for expert in range(6):
        desk.ask(plain(PROMPTS[0], 3, steer=SteerWish(deactivate=((layer, (expert,)),))))
    desk.run()
    assert all(isinstance(desk.last(n), Ended) for n in range(6))
    assert len({desk.frames[n][0].steering for n in range(6)}) == 6
    assert len(desk.scheduler._lanes) <= 1
    assert demo.editor.steering.empty


def test_memory_is_wired_once_for_all_lanes(demo: Session, monkeypatch: Any) -> None:
    asked: list[int] = []
    put_back: list[int] = []
    monkeypatch.setattr(lane_set, "maybe_set_recommended_wired_limit", lambda: asked.append(1) or 7)
    monkeypatch.setattr(mx, "set_wired_limit", put_back.append)
    desk = Desk(demo)
    wish = SteerWish(deactivate=((demo.anatomy.indices[0], (1,)),))
    for steer in (None, wish, None):
        desk.ask(plain(PROMPTS[0], 3, steer=steer))
    desk.run()
    desk.scheduler.settle(SILENT)
    assert (asked, put_back) == ([1], [])
    desk.scheduler.close("over")
    assert put_back == [7]


def test_a_drain_can_be_cancelled(demo: Session) -> None:
    class Impatient(Context):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls > 3:
                raise Cancelled("cancelled")

    desk = Desk(demo)
    number = desk.ask(plain(PROMPTS[0], 30))
    desk.scheduler.step()
    with pytest.raises(Cancelled):
        desk.scheduler.settle(Impatient())
    desk.run()
    assert desk.last(number).completion_tokens == 30


def test_what_waits_is_not_admitted_by_a_drain(demo: Session) -> None:
    desk = Desk(demo, concurrency=1)
    first, second = (desk.ask(plain(PROMPTS[0], 6)) for _ in range(2))
    desk.scheduler.step()
    desk.scheduler.settle(Context())
    assert isinstance(desk.last(first), Ended)
    assert desk.frames[second] == []
    desk.run()
    assert isinstance(desk.last(second), Ended)
