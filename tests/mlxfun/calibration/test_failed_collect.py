"""A collect that fails leaves the statistics that there were, and what is said about their origin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import MlxfunError, ModelError

FIRST = CollectOptions(DatasetOptions("demo:mixed", max_samples=4, max_tokens=16))
OTHER = DatasetOptions("demo:python", max_samples=4, max_tokens=16)


class Fails(Context):
    """The second batch goes wrong."""

    def __init__(self) -> None:
        self.left = 1

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ModelError("the device is gone")


@pytest.mark.parametrize(
    "options",
    [
        CollectOptions(OTHER, max_batch=1),
        CollectOptions(OTHER, max_batch=1, add=True),
        CollectOptions(replace(OTHER, source="demo:nothing")),
    ],
)
def test_statistics_keep_their_numbers_and_their_origin(
    session: Session, options: CollectOptions
) -> None:
    kept = session._observations
    session.collect(FIRST)
    sums = {name: array.copy() for name, array in kept.stats.sums.items()}
    tokens, origin = kept.stats.tokens, kept.source_commands
    held_out, calibration = kept.held_out, kept.calibration
    assert origin == ("collect --dataset demo:mixed",)
    with pytest.raises(MlxfunError):
        session.collect(options, Fails())
    assert kept.stats.tokens == tokens
    for name, array in sums.items():
        np.testing.assert_array_equal(kept.stats.sums[name], array)
    assert kept.source_commands == origin
    assert (kept.held_out, kept.calibration) == (held_out, calibration)
