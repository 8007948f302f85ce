"""Samples to calibrate on and samples to judge by never overlap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxfun.data.split import split_samples
from mlxfun.errors import UsageError


@settings(deadline=None)
@given(st.integers(0, 200), st.none() | st.integers(1, 250), st.integers(0, 5))
def test_both_parts_are_disjoint_ascending_and_reproducible(
    n: int, wanted: int | None, seed: int
) -> None:
    calibration, held_out = split_samples(n, wanted, seed, 0.125, 4)
    assert len(set(calibration) | set(held_out)) == len(calibration) + len(held_out) <= n
    assert list(calibration) == sorted(calibration)
    assert list(held_out) == sorted(held_out)
    assert (calibration, held_out) == split_samples(n, wanted, seed, 0.125, 4)
    if n >= 2:
        assert calibration
    if wanted is None or wanted >= n:
        assert len(calibration) + len(held_out) == n


def test_what_calibration_does_not_want_is_held_out_first() -> None:
    calibration, held_out = split_samples(100, 32, 0, 0.125, 4)
    assert (len(calibration), len(held_out)) == (32, 4)
    assert len(split_samples(33, 32, 0, 0.125, 4)[1]) == 1, "one is left over"
    assert [len(part) for part in split_samples(32, None, 0, 0.125, 4)] == [28, 4]
    assert split_samples(100, 32, 0, 0.125, 4) != split_samples(100, 32, 1, 0.125, 4)


def test_none_wanted_is_an_error() -> None:
    with pytest.raises(UsageError, match="--max-samples 0 must be at least 1"):
        split_samples(10, 0, 0, 0.125, 4)
