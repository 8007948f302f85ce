"""Targets, and the choice among variants."""

from __future__ import annotations

import math

import pytest

from mlxfun.errors import UsageError
from mlxfun.session.measuring.variants import (
    Target,
    Variant,
    best,
    parse_target,
    shortfall,
)


def variant(line: str, size: int, kl: float | None, error: str = "") -> Variant:
    return Variant(line, size, kl, None if kl is None else 1.0 + kl, 0.5, error)


VARIANTS = (
    variant("small", 4_000_000, 0.9),
    variant("failed", 0, None, "no"),
    variant("middle", 5_000_000, 0.4),
    variant("middle again", 5_000_000, 0.4),
    variant("large", 6_000_000, 0.1),
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("at most 5 MB", Target("bytes", 5e6)),
        ("at most 5.5MiB", Target("bytes", 5.5 * 2**20)),
        ("at most 1_000 bytes", Target("bytes", 1000.0)),
        ("at most 42", Target("bytes", 42.0)),
        ("at  most 0.25 KL", Target("KL", 0.25)),
        ("at most 1kl", Target("KL", 1.0)),
    ],
)
def test_a_target_reads_as_it_is_said(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["at most", "at most x MB", "at most 5 parsecs", "at most -1 KL",
                                  "at least 5 MB", "at most 0 KL", f"at most {10**400}"])  # fmt: skip
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UsageError, match=r"is no target|must be above 0"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("at most 5 MB", 2), ("at most 10 MB", 4), ("at most 4 MB", 0), ("at most 3 MB", None),
     ("at most 0.4 KL", 2), ("at most 2 KL", 0), ("at most 0.05 KL", None)],
)  # fmt: skip
def test_a_size_keeps_the_least_loss_and_a_loss_the_smallest_size(text, kept):
    assert best(VARIANTS, parse_target(text)) == kept


@pytest.mark.parametrize("kl", [math.nan, math.inf])
@pytest.mark.parametrize("text", ["at most 5 MB", "at most 0.4 KL"])
def test_a_loss_that_is_no_number_meets_no_target(kl, text):
    broken = (variant("broken", 1_000_000, kl), Variant("half", 1_000_000, 0.01, kl, 0.5))
    target = parse_target(text)
    assert best(broken, target) is None
    assert best((*broken, *VARIANTS), target) == 4
    assert shortfall(broken, target).startswith("none of the 2 variants could be measured")
    assert shortfall((*broken, VARIANTS[4]), parse_target("at most 2 MB")) == (
        "none of the 1 measured variants keeps within at most 2000000 bytes; the nearest has "
        "6000000 bytes: large"
    )


def test_equal_sizes_are_decided_by_the_loss():
    rivals = (variant("a", 100, 0.3), variant("b", 100, 0.2))
    assert best(rivals, parse_target("at most 1 KL")) == 1


def test_a_target_that_none_meets_is_answered_with_the_nearest():
    assert shortfall(VARIANTS, parse_target("at most 3 MB")) == (
        "none of the 4 measured variants keeps within at most 3000000 bytes; the nearest has "
        "4000000 bytes: small"
    )
    assert "the nearest has 0.1000 KL: large" in shortfall(
        VARIANTS, parse_target("at most 0.01 KL")
    )
    assert shortfall(VARIANTS[1:2], parse_target("at most 1 KL")) == (
        "none of the 1 variants could be measured (failed: no)"
    )
