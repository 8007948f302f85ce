"""The search for the gentlest edit: its points, its sampler, its front."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun.errors import UsageError
from mlxfun.techniques.ablate.options import parse_strength
from mlxfun.techniques.ablate.search import (
    OWN,
    Bounds,
    Point,
    Space,
    Trial,
    front,
    grid,
    search,
)

BOUNDS = Bounds(kl=0.1, text=0.01)
SPACE = Space(8, (4, 2, 1), ("last", "mean"), ("attention", "experts"))


def bowl(point: Point) -> Trial:
    """Least refusals at layer 1 and attention 2.2; the KL grows with everything."""
    refusals = min(1.0, 0.3 * (point.source != 1) + abs(point.strengths[0] - 2.2))
    return Trial(point, refusals, 0.02 * sum(point.strengths) * (0.2 + point.floor))


def test_a_profile_is_a_bump_on_a_floor() -> None:
    point = Point(2, "last", (2.0, 1.0), centre=3.0, reach=4.0, floor=0.2)
    assert [round(point.profile(i), 3) for i in range(8)] == [0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2]
    spread = point.spread(SPACE)
    assert spread["attention"][3] == 2.0
    assert spread["experts"] == {0: 0.4, 1: 0.6, 2: 0.8, 3: 1.0, 4: 0.8, 5: 0.6, 6: 0.4, 7: 0.2}


def test_the_first_trials_are_the_plain_ones_strongest_source_first() -> None:
    points = grid(SPACE)
    assert [(p.source, p.position, p.strengths) for p in points[:3]] == [
        (4, "last", (1.0, 1.0)), (4, "last", (2.0, 2.0)), (4, "mean", (1.0, 1.0)),
    ]  # fmt: skip
    assert len(points) == 3 * 2 * 2
    tried = search(SPACE, bowl, 20, BOUNDS, seed=3)
    assert [t.point for t in tried[:8]] == points[:8]


def test_of_each_parts_own_difference_middling_strengths_come_first() -> None:
    space = Space(8, (OWN,), ("last",), ("attention", "experts"))
    assert [p.strengths[0] for p in grid(space)] == [0.7, 1.0, 0.5, 0.35, 1.4, 2.0]


def test_the_same_seed_tries_the_same_points() -> None:
    one, two = (search(SPACE, bowl, 30, BOUNDS, seed=5) for _ in range(2))
    assert one == two
    assert search(SPACE, bowl, 30, BOUNDS, seed=6) != one


def test_every_point_is_inside_the_space() -> None:
    for trial in search(SPACE, bowl, 60, BOUNDS, seed=1):
        point = trial.point
        assert point.source in SPACE.sources
        assert point.position in SPACE.positions
        assert all(0 <= s <= 3 for s in point.strengths)
        assert 0 <= point.centre <= 7
        assert 1 <= point.reach <= 8
        assert 0 <= point.floor <= 1


def test_it_beats_drawing_at_random() -> None:
    def random_best(seed: int) -> float:
        rng = np.random.default_rng(seed)
        points = [
            Point(
                int(rng.choice(SPACE.sources)), "last", tuple(rng.uniform(0, 3, 2)),
                rng.uniform(0, 7), rng.uniform(1, 8), rng.uniform(0, 1),
            )
            for _ in range(60)
        ]  # fmt: skip
        return min(bowl(p).cost(BOUNDS) for p in points)

    found = [min(t.cost(BOUNDS) for t in search(SPACE, bowl, 60, BOUNDS, s)) for s in range(4)]
    drawn = [random_best(s) for s in range(4)]
    assert np.mean(found) < 0.8 * np.mean(drawn)


def trial(refusals: float, kl: float, false: float = 0.0, text: float = 0.0) -> Trial:
    return Trial(grid(SPACE)[0], refusals, kl, false, text)


def test_the_front_holds_what_nothing_beats_gentlest_first() -> None:
    tried = [
        trial(0.5, 0.01), trial(0.6, 0.02), trial(0.1, 0.05), trial(0.1, 0.2), trial(0.0, 0.9),
        trial(0.0, 0.3, 0.4), trial(0.05, 0.3),
    ]  # fmt: skip
    assert front(tried) == [tried[0], tried[2], tried[6]]
    # What costs plain text less stays, though another has fewer refusals at a lower KL.
    gentle, harsh = trial(0.2, 0.06, text=0.001), trial(0.1, 0.05, text=0.08)
    assert front([harsh, gentle]) == [harsh, gentle]
    assert front([harsh, trial(0.1, 0.06, text=0.09)]) == [harsh]


def test_an_edit_beyond_the_bound_costs_more_than_the_refusals_it_saves() -> None:
    assert trial(0.3, 0.09).cost(BOUNDS) < trial(0.0, 0.15).cost(BOUNDS)
    assert trial(0.3, 0.09).cost(BOUNDS) < trial(0.3, 0.1).cost(BOUNDS)
    assert trial(0.0, float("nan")).cost(BOUNDS) > 1e5
    assert trial(0.3, 0.01, text=0.009).cost(BOUNDS) < trial(0.0, 0.01, text=0.014).cost(BOUNDS)
    assert trial(0.3, 0.01, text=-0.1).cost(BOUNDS) == trial(0.3, 0.01).cost(BOUNDS)
    assert trial(0.0, 0.01, 0.5).cost(BOUNDS) > trial(0.4, 0.01).cost(BOUNDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "'much' is neither a number nor COMPONENT@A-B=NUMBER"),
        ("1,heads=2", "no component 'heads'; choose among attention, dense, shared, experts"),
        ("experts=9", "'9' must be a number from 0"),
        ("-1", "'-1' is neither a number"),
        ("attention@5-2=1", "the range '5-2' ends before it begins"),
        ("", "'' is neither a number"),
    ],
)
def test_a_wrong_strength_is_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_strength(text)
