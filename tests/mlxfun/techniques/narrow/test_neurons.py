"""The choice of neurons against a slow twin that inverts and refits anew at each step."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun.techniques.narrow import neurons
from mlxfun.techniques.narrow.neurons import DAMPING, kept_by_obs, kept_by_size


def problem(size: int = 24, width: int = 10, tokens: int = 60, seed: int = 0):
    """(features [n, N], W [N, D]) with neurons that repeat each other."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(tokens, size)) * generator.uniform(0.2, 2, size)
    features[:, size // 2 :] += 0.8 * features[:, : size - size // 2]
    return features, generator.normal(size=(size, width))


def matrices(*problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H^T H, W W^T), [B, N, N], of one expert after the other: features, W, features, W, ..."""
    features, outward = problems[::2], problems[1::2]
    return np.stack([f.T @ f for f in features]), np.stack([w @ w.T for w in outward])


def naive(features: np.ndarray, outward: np.ndarray, keep: int, group: int = 1) -> list[int]:
    """Each step: refit without each group in turn, and let go of the one that costs least.

    The cost is that of the damped least squares (Y - H_S W_S)^2 + damping (W - W_S)^2, where
    neurons that are gone count with weight 0.
    """
    normal = features.T @ features
    size = len(normal)
    normal = normal + DAMPING * np.trace(normal) / size * np.eye(size)

    def loss(kept: list[int]) -> float:
        best = np.linalg.solve(normal[np.ix_(kept, kept)], normal[kept] @ outward)
        full = np.zeros_like(outward)
        full[kept] = best
        off = full - outward
        return float(np.sum(off * (normal @ off)))

    left = [list(range(g, g + group)) for g in range(0, size, group)]
    while sum(map(len, left)) > keep:
        losses = [loss([n for g in left if g is not out for n in g]) for out in left]
        left.pop(int(np.argmin(losses)))
    return [n for g in left for n in g]


@pytest.mark.parametrize("block", [1, 5, 32])
@pytest.mark.parametrize("seed", range(4))
def test_the_neurons_that_stay_are_those_of_a_slow_twin(monkeypatch, block, seed) -> None:
    monkeypatch.setattr(neurons, "BLOCK", block)
    features, outward = problem(seed=seed)
    for keep in (20, 12, 3):
        found = kept_by_obs(*matrices(features, outward), keep)
        assert found[0].tolist() == naive(features, outward, keep)


@pytest.mark.parametrize("seed", range(4))
def test_whole_groups_go_by_the_same_rule(seed) -> None:
    features, outward = problem(seed=seed)
    for keep in (20, 12, 4):
        found = kept_by_obs(*matrices(features, outward), keep, group=4)
        assert found[0].tolist() == naive(features, outward, keep, group=4)


def test_a_neuron_that_others_make_up_for_goes_before_a_smaller_one() -> None:
    generator = np.random.default_rng(3)
    features = generator.normal(size=(200, 4))
    features[:, 1] = features[:, 0] + 1e-3 * generator.normal(size=200)  # as good as the same
    features[:, 3] *= 0.5
    outward = np.eye(4)
    assert kept_by_obs(*matrices(features, outward), 3)[0].tolist() in (
        [0, 2, 3],
        [1, 2, 3],
    )
    assert kept_by_size(np.sqrt((features**2).mean(axis=0)), 3).tolist() == [0, 1, 2]


def test_sizes_are_summed_over_groups() -> None:
    scores = np.array([5.0, 0, 3, 3, 1, 1, 0, 2])
    assert kept_by_size(scores, 4).tolist() == [0, 2, 3, 7]
    assert kept_by_size(scores, 4, group=2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("group", [1, 4])
def test_experts_that_are_judged_together_are_judged_alone(group) -> None:
    problems = [problem(seed=seed) for seed in range(3)]
    together = kept_by_obs(*matrices(*(a for p in problems for a in p)), 12, group)
    assert together.tolist() == [naive(*p, 12, group) for p in problems]
