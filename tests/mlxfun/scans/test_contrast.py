"""Two sets are told apart by their experts when they differ, and by nothing when they do not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxfun.errors import DatasetError, UsageError
from mlxfun.scans import contrast as c
from mlxfun.scans.contrast import Rules, SampleRouting

L, E, K = 3, 16, 4
ALIVE = np.ones((L, E), bool)


def routing(seed: int, samples: int = 24, shift: float = 0.0, planted=((0, 3), (2, 7))):
    """Random routing; texts have topics (whole samples lean to some experts), as real ones do."""
    rng = np.random.default_rng(seed)
    lean = rng.normal(size=(samples, L, E)) * 0.8
    for layer, expert in planted:
        lean[:, layer, expert] += shift
    share = np.exp(lean)
    share = np.minimum(K * share / share.sum(axis=-1, keepdims=True), 1.0)
    tokens = rng.integers(20, 60, samples)
    freq = rng.binomial(tokens[:, None, None], share) / tokens[:, None, None]
    gate = freq * rng.uniform(0.2, 0.4, size=(samples, 1, 1))
    return SampleRouting(freq, gate, tokens, np.zeros((L, E)), 0)


def test_the_differences_and_the_composite_are_those_of_the_formula():
    a = SampleRouting(
        np.full((4, 1, 3), [0.5, 0.25, 0.0]), np.full((4, 1, 3), [0.2, 0.1, 0.0]),
        np.full(4, 8), np.array([[6.0, 2.0, 0.0]]), 8,
    )  # fmt: skip
    b = SampleRouting(
        np.full((5, 1, 3), [0.0, 0.5, 0.0]), np.full((5, 1, 3), [0.0, 0.2, 0.0]),
        np.full(5, 8), np.array([[1.0, 2.0, 4.0]]), 4,
    )  # fmt: skip
    found = c.contrast(a, b, np.ones((1, 3), bool), Rules())
    np.testing.assert_allclose(found.differential_freq, [[0.5, -0.25, 0.0]])
    np.testing.assert_allclose(found.differential_activation, [[0.2, -0.1, 0.0]])
    np.testing.assert_allclose(found.composite, [[1.0, -0.5, 0.0]])
    np.testing.assert_allclose(found.risk_difference, [[6 / 8 - 1 / 4, 2 / 8 - 2 / 4, -1.0]])


def test_without_answers_there_is_no_risk_difference():
    a, b = routing(0), replace(routing(1), answer_tokens=7)
    assert c.contrast(a, b, ALIVE, Rules()).risk_difference is None
    assert c.risk_difference(replace(a, answer_tokens=3), b) is not None


def naive_t(column, labels) -> float:
    one = [x for x, is_a in zip(column, labels, strict=True) if is_a]
    two = [x for x, is_a in zip(column, labels, strict=True) if not is_a]
    m1, m2 = sum(one) / len(one), sum(two) / len(two)
    within = sum((x - m1) ** 2 for x in one) + sum((x - m2) ** 2 for x in two)
    return (m1 - m2) / (within / (len(column) - 2) * (1 / len(one) + 1 / len(two))) ** 0.5


@given(st.integers(0, 10_000), st.integers(3, 9), st.integers(3, 9), st.integers(1, 5))
def test_p_values_equal_a_naive_count_over_the_pooled_shuffles(seed, n_a, n_b, columns):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n_a + n_b, columns))
    is_a = np.arange(n_a + n_b) < n_a
    labels = c.shuffled(is_a, 20, rng)
    assert (labels.sum(axis=1) == n_a).all()
    null = [abs(naive_t(u[:, e], row)) for row in labels for e in range(columns)]
    expected = []
    for e in range(columns):
        own = abs(naive_t(u[:, e], is_a))
        expected.append((1 + sum(t >= own - 1e-9 for t in null)) / (1 + len(null)))
    np.testing.assert_allclose(c.permutation_p(u, is_a, labels), expected)


def naive_q(p: list[float]) -> list[float]:
    """The definition: the least rejection threshold's false discovery estimate that admits it."""
    return [min(1.0, *(len(p) * t / sum(x <= t for x in p) for t in p if t >= own)) for own in p]


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12))
def test_q_values_are_those_of_the_definition(p):
    np.testing.assert_allclose(c.benjamini_hochberg(np.array(p)), naive_q(p), rtol=1e-12)


def test_stability_is_the_share_of_resamples_that_choose_an_expert_again():
    """Twin: resample lists with the same draws, take percentiles, count."""
    a, b = routing(3, 10, 1.0), routing(4, 8)
    mixed = np.concatenate([a.frequency, b.frequency]).reshape(18, -1)
    is_a = np.arange(18) < 10
    rules = Rules(percentile=80, resamples=30)
    found = c.stability_of(mixed, is_a, rules, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    times = [rng.multinomial(n, [1 / n] * n, size=30) for n in (10, 8)]
    hits = np.zeros(L * E)
    observed = mixed[:10].mean(axis=0) - mixed[10:].mean(axis=0)
    for r in range(30):
        again = np.concatenate([np.repeat(mixed[:10], times[0][r], axis=0)]).mean(axis=0)
        again = again - np.repeat(mixed[10:], times[1][r], axis=0).mean(axis=0)
        up = (again >= np.percentile(again, 80)) & (again > 0)
        down = (again <= np.percentile(again, 20)) & (again < 0)
        hits += np.where(observed >= 0, up, down)
    np.testing.assert_allclose(found, hits / 30)


def test_planted_differences_are_found_and_their_direction_is_right():
    found = c.contrast(routing(1, 32, 1.6), routing(2, 32), ALIVE, Rules())
    assert found.more[0, 3]
    assert found.more[2, 7]
    assert found.more.sum() <= 3, "what was not planted is not flagged"
    assert not found.less[0, 3]
    turned = c.contrast(routing(2, 32), routing(1, 32, 1.6), ALIVE, Rules())
    assert turned.less[0, 3]
    assert turned.less[2, 7]
    np.testing.assert_allclose(turned.composite, -found.composite)
    assert np.abs(found.composite).max() <= 1.0


def test_identical_sets_flag_nothing_at_all():
    a = routing(7)
    found = c.contrast(a, a, ALIVE, Rules())
    assert not (found.more | found.less | found.by_percentile).any()
    assert found.p.min() == 1.0


def test_rounding_noise_is_not_blown_up_to_a_difference():
    a = routing(7)
    noise = np.random.default_rng(0).normal(size=a.gate.shape) * 1e-9
    found = c.contrast(a, replace(a, gate=a.gate + noise), ALIVE, Rules())
    assert np.abs(found.composite).max() < 0.01


def test_two_halves_of_one_set_flag_at_most_one_percent_though_the_percentile_rule_names_a_fifth():
    flagged, named = [], []
    for seed in range(40):
        whole = routing(seed, 40)
        halves = [
            replace(whole, frequency=whole.frequency[i::2], gate=whole.gate[i::2]) for i in (0, 1)
        ]
        found = c.contrast(*halves, ALIVE, Rules(seed=seed))
        flagged.append((found.more | found.less).mean())
        named.append(found.by_percentile.mean())
    assert np.mean(flagged) <= 0.01
    assert np.mean(named) > 0.15, "else this shows nothing"


def test_p_values_are_uniform_when_there_is_nothing_to_find():
    p = np.concatenate([
        c.contrast(routing(s, 16), routing(1000 + s, 16), ALIVE, Rules(seed=s)).p.reshape(-1)
        for s in range(40)
    ])  # fmt: skip
    for level in (0.01, 0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 0.02 + 0.05 * level


def test_pruned_experts_are_left_out_of_the_percentiles_and_never_flagged():
    alive = ALIVE.copy()
    alive[:, 8:] = False
    a, b = routing(1, 32, 1.6), routing(2, 32)
    for x in (a, b):
        x.frequency[:, :, 8:] = x.gate[:, :, 8:] = 0
    found = c.contrast(a, b, alive, Rules())
    assert found.more[0, 3]
    assert not (found.more | found.less)[:, 8:].any()
    assert (found.p[:, 8:] == 1.0).all()
    narrow = [SampleRouting(x.frequency[:, :, :8], x.gate[:, :, :8], x.tokens,
                            x.answer_counts[:, :8], 0) for x in (a, b)]  # fmt: skip
    alone = c.contrast(*narrow, ALIVE[:, :8], Rules())
    np.testing.assert_array_equal(found.p[:, :8], alone.p)


def test_an_expert_nobody_uses_lends_no_zeros_to_the_null():
    u = np.random.default_rng(0).normal(size=(12, 6))
    is_a = np.arange(12) < 6
    labels = c.shuffled(is_a, 50, np.random.default_rng(1))
    padded = np.concatenate([u, np.zeros((12, 94))], axis=1)
    found = c.permutation_p(padded, is_a, labels)
    np.testing.assert_array_equal(found[:6], c.permutation_p(u, is_a, labels))
    assert (found[6:] == 1.0).all()


def test_a_perfect_separation_is_finite_and_has_the_least_p():
    u = np.zeros((12, 2))
    u[:6, 0] = 1.0
    u[:, 1] = np.random.default_rng(0).normal(size=12)
    is_a = np.arange(12) < 6
    rows = [[i in chosen for i in range(12)] for chosen in itertools.combinations(range(12), 6)]
    p = c.permutation_p(u, is_a, np.array(rows))
    assert p[0] == pytest.approx(3 / (1 + 2 * 924))  # itself and its mirror image
    assert p[0] < p[1]


def test_the_same_seed_gives_the_same_answer():
    a, b = routing(1, 12, 1.0), routing(2, 12)
    first, second = (c.contrast(a, b, ALIVE, Rules(seed=9)) for _ in range(2))
    np.testing.assert_array_equal(first.stability, second.stability)
    np.testing.assert_array_equal(first.p, second.p)


def test_impossible_rules_and_too_few_samples_are_refused_with_the_figures():
    a = routing(1, 8)
    for rules, message in (
        (Rules(percentile=100), "--threshold-percentile 100 must be at least 50 and below 100"),
        (Rules(percentile=10), "--threshold-percentile 10 must be"),
        (Rules(alpha=0), "--alpha 0 must be between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            c.contrast(a, a, ALIVE, rules)
    with pytest.raises(DatasetError, match=r"3 samples of the second set .* at least 4"):
        c.contrast(a, routing(1, 3), ALIVE, Rules())
