"""Amplifying a domain on a trained model: its experts get more of the routing, its text no worse."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.techniques.router_bias.options import AmplifyOptions

pytestmark = pytest.mark.slow


def routed_share(session, text, more) -> float:
    """Share of all selections that go to the experts of `more` on `text`."""
    session.collect(CollectOptions(text))
    freq = session._observations.stats.sums["freq"]
    rows = dict(zip(session.anatomy.indices, freq, strict=True))
    chosen = sum(rows[layer][list(experts)].sum() for layer, experts in more.items())
    return float(chosen / sum(rows[layer].sum() for layer in more))


@pytest.mark.parametrize("domain", ["solidity", "medical", "python"])
def test_amplifying_a_domain_raises_its_experts_and_not_its_perplexity(
    shared, tmp_path, domain, capsys
):
    session = Session.open(shared.model)
    report = tmp_path / "report.json"
    first = DatasetOptions(str(shared.data / f"calib_{domain}.jsonl"), max_tokens=256)
    second = DatasetOptions(str(shared.data / "calib_wiki.jsonl"), max_tokens=256)
    found = session.domain_scan(ScanOptions(first, second, report, domain_name=domain))
    unseen = DatasetOptions(str(shared.data / f"eval_{domain}.jsonl"), max_tokens=256)
    before = routed_share(session, unseen, found.more)
    fitted = DatasetOptions(shared.mixed, max_samples=32, max_tokens=256)
    plan = session.amplify(AmplifyOptions(report, fitted))
    measured = session.preview(EvaluateOptions((unseen,)))
    session.apply(ApplyOptions())
    after = routed_share(session, unseen, found.more)
    with capsys.disabled():
        worst = min(row.r2 for row in plan.rows)
        print(f"\n{domain}: routed share {before:.3f} -> {after:.3f}, perplexity "
              f"x{measured.ratio:.4f}, R^2 at least {worst:.3f}")  # fmt: skip
    assert after > before * 1.05
    assert measured.ratio <= 1.02
    assert worst > 0.8
    session.close()
