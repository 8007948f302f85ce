"""What merging costs on a trained model; tests/bench/merge_quality.py prints the whole table.

Measured: perplexity 15.5 becomes 27.3 when 8 of 32 experts a layer are merged away, and 22.5 when
they are pruned to the same centroids. The reason is in the last figure: this model's experts were
trained from scratch and have next to no neurons in common, so that a mean of aligned weights
cancels, and a merged expert puts out a tenth of what its centroid did.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlxfun import Session

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from merge_quality import compare

pytestmark = pytest.mark.slow


def test_merging_a_quarter_of_the_experts_costs_less_than_doubling_the_perplexity(shared):
    session = Session.open(shared.model)
    before = session.state
    outcome = compare(session, shared.data, 8, "reap_sum")
    assert outcome.merged < 1.9 * outcome.base
    assert outcome.pruned < 1.6 * outcome.base
    assert 0 < outcome.shrink < 1
    assert session.state == before
    session.close()
