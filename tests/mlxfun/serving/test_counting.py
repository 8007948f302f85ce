"""What is counted of requests: exactly the forwards that ran, whenever it is read and however a
request ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from desk_rigs import PROMPTS, Desk, plain, tokens_of

from mlxfun import Session
from mlxfun.arrays import Array
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.serving import lanes, routing
from mlxfun.serving.ask import Failed, SteerWish
from mlxfun.steering.options import SteerOptions


@pytest.fixture(scope="module")
def opened() -> Iterator[Session]:
    found = Session.open("demo")
    yield found
    found.close()


@pytest.fixture
def demo(opened: Session) -> Iterator[Session]:
    opened.set_counting(True)
    yield opened
    opened.reset_stats()
    opened.set_counting(False)


def counted_by_hand(session: Session, texts: list[tuple[int, ...]]) -> Array:
    """Sums [L, S, E] of whole texts, token by token, each text read alone."""
    layers, experts = len(session.anatomy.layers), session.anatomy.num_experts
    sums = np.zeros((layers, len(SUMS), experts))
    for text in texts:
        with session.taps.recording() as recording:
            mx.eval(session.model(mx.array([text])))
            records = [found[-1] for found in recording.drain()]
        for layer, record in enumerate(records):
            chosen, shares, norms = (
                np.array(a.astype(mx.float32), dtype=np.float64).reshape(len(text), -1)
                for a in (record.indices, record.weights, record.norms)
            )
            for place in np.ndindex(chosen.shape):
                g, f = shares[place], norms[place]
                sums[layer, :, int(chosen[place])] += (1, g, f, g * f, (g * f) ** 2, f * f)
    return sums


def check(session: Session, texts: list[tuple[int, ...]], norms: bool = True) -> None:
    stats: RoutingStats = session.traffic_stats()
    expected = counted_by_hand(session, texts)
    assert stats.tokens == sum(len(text) for text in texts)
    np.testing.assert_array_equal(stats.sums["freq"], expected[:, 0])
    for place, name in enumerate(SUMS if norms else SUMS[:2]):
        np.testing.assert_allclose(stats.sums[name], expected[:, place], rtol=1e-4, atol=1e-4)
    if not norms:
        assert not stats.sums["reap_sum"].any()


def texts_of(desk: Desk, numbers: list[int]) -> list[tuple[int, ...]]:
    """What the forwards of these requests have read: prompts, and each token that was told."""
    return [(*PROMPTS[n], *tokens_of(desk, n)) for n in numbers]


@pytest.mark.parametrize("steps", [1, 5, 1000])
@pytest.mark.parametrize("count", ["full", "lightweight"])
def test_ragged_prompts_and_batches_are_counted_token_by_token(
    demo: Session, monkeypatch: pytest.MonkeyPatch, steps: int, count: Any
) -> None:
    monkeypatch.setattr(routing, "STEPS", steps)
    monkeypatch.setattr(lanes, "CPU_PREFILL", 16)
    desk = Desk(demo, count=count, cache_bytes=0, concurrency=4)
    numbers = [desk.ask(plain(prompt, 5 + n)) for n, prompt in enumerate(PROMPTS)]
    desk.run()
    check(demo, texts_of(desk, numbers), norms=count == "full")
    assert demo.traffic_stats().samples == len(PROMPTS)


def test_statistics_are_exact_whenever_they_are_read(demo: Session) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    numbers = [desk.ask(plain(PROMPTS[n], 20)) for n in range(2)]
    for _ in range(9):
        desk.scheduler.step()
        stats = demo.traffic_stats()
        assert stats.sums["freq"].sum() == stats.tokens * 6 * 2
    check(demo, texts_of(desk, numbers))
    desk.run()
    check(demo, texts_of(desk, numbers))


def test_nothing_is_lost_when_clients_go_away(demo: Session) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    numbers = [desk.ask(plain(PROMPTS[n], 40)) for n in range(3)]
    for _ in range(9):
        desk.scheduler.step()
    desk.gone += numbers
    desk.scheduler.step()
    check(demo, texts_of(desk, numbers))


def test_nothing_is_lost_when_a_step_fails(demo: Session, monkeypatch: Any) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    numbers = [desk.ask(plain(PROMPTS[n], 40)) for n in range(3)]
    for _ in range(9):
        desk.scheduler.step()
    said = texts_of(desk, numbers)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(lanes.BatchLane, "step", broken)
    desk.scheduler.step()
    assert all(isinstance(desk.last(n), Failed) for n in numbers)
    check(demo, said)


def test_nothing_is_lost_at_the_end_of_the_server(demo: Session) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    numbers = [desk.ask(plain(PROMPTS[n], 40)) for n in range(3)]
    for _ in range(9):
        desk.scheduler.step()
    said = texts_of(desk, numbers)
    desk.scheduler.close("over")
    demo.before_statistics(lambda: None)
    check(demo, said)


def test_what_ran_before_a_reset_is_not_counted_behind_it(demo: Session) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    number = desk.ask(plain(PROMPTS[0], 20))
    for _ in range(6):
        desk.scheduler.step()
    before = len(tokens_of(desk, number))
    demo.reset_stats()
    desk.run()
    assert demo.traffic_stats().tokens == 20 - before


def test_counting_that_stops_keeps_what_ran_until_then(demo: Session) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    number = desk.ask(plain(PROMPTS[0], 20))
    for _ in range(6):
        desk.scheduler.step()
    said = texts_of(desk, [number])
    demo.set_counting(False)
    desk.run()
    check(demo, said)
    demo.set_counting(True)


def test_a_steered_request_marks_the_statistics_though_they_are_read_unsteered(
    demo: Session,
) -> None:
    desk = Desk(demo, count="full", cache_bytes=0)
    wish = SteerWish(deactivate=((demo.anatomy.indices[0], (0, 1)),))
    number = desk.ask(plain(PROMPTS[0], 6, steer=wish))
    desk.run()
    stats = demo.traffic_stats()
    assert stats.steered
    assert stats.tokens == 3 + 6
    assert stats.sums["freq"][0, :2].sum() == 0
    demo.steer(SteerOptions(deactivate={demo.anatomy.indices[0]: (0, 1)}))
    try:
        expected = counted_by_hand(demo, texts_of(desk, [number]))
        np.testing.assert_array_equal(stats.sums["freq"], expected[:, 0])
    finally:
        demo.steer(SteerOptions(clear=True))


def test_a_model_that_computes_nonsense_is_not_counted_and_says_so(
    demo: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "STEPS", 2)
    broken = demo.model.model.layers[3].mlp.switch_mlp.down_proj
    before = broken.weight
    desk = Desk(demo, count="full", cache_bytes=0)
    desk.ask(plain(PROMPTS[0], 30))
    try:
        broken.weight = before * float("nan")
        desk.run()
    finally:
        broken.weight = before
    assert isinstance(desk.last(0), Failed)
    assert "NaN or infinity" in desk.last(0).message
    assert np.isfinite(demo.traffic_stats().sums["reap_sum"]).all()
