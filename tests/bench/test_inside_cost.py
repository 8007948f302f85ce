"""Looking inside a forward costs next to nothing, and nothing where nothing is looked at.

Run with `pytest -n 0 -m bench -s tests/bench/test_inside_cost.py`.
"""

from __future__ import annotations

import pytest

from mlxfun import Session
from tests.bench.inside_cost import rows

pytestmark = pytest.mark.bench

CAPTURE = 1.05
"""1.02 on a quiet machine; two shared cores vary by more."""


def test_capturing_one_layer_costs_a_fiftieth_of_a_forward() -> None:
    session = Session.open("demo")
    found = rows(session, tokens=480, pairs=15)
    for what, figure, peak in found:
        print(f"{what:45} {figure:8.3f}  {peak / 2**20:8.1f} MiB")
    ratios = {what: figure for what, figure, _ in found}
    assert ratios["untouched forward after traces, of plain"] < CAPTURE
    assert ratios["capture one layer, of plain"] < CAPTURE
    session.close()
