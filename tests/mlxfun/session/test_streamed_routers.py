"""Router edits and steering of a model on disk, and one expert's profile, are those of a resident one."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from tests.mlxfun import tiny_checkpoints as tiny
from tests.tiny_models import CONFIGS

DATA = DatasetOptions("demo:mixed", max_samples=5, max_tokens=20)
PROMPTS = [DatasetOptions(f"demo:{n}", max_samples=24, max_tokens=24) for n in ("harmful", "mixed")]
EVALUATE = EvaluateOptions((DATA,))


def everything(session: Session, path) -> list:
    """What scans, router edits and steering come to. Where nothing can be amplified, that is it."""
    report = path / "domain_report.json"
    session.collect(CollectOptions(DATA))
    scan = ScanOptions(*PROMPTS, report, threshold_percentile=60, alpha=0.9, domain_name="x")
    found: list = [session.domain_scan(scan).rows]
    try:
        found.append(session.amplify(AmplifyOptions(report, DATA)).kept)
        session.apply(ApplyOptions())
    except PlanError as problem:
        found.append(str(problem))
    session.steer(SteerOptions(deactivate={1: (0,)}))
    found.append(session.evaluate(EVALUATE))
    found.append(session.bake(BakeOptions(DATA)).kept)
    session.apply(ApplyOptions())
    found += [session.state, session.evaluate(EVALUATE), session.dossier(1, 2, ProbeOptions(DATA))]
    session.save(SaveOptions(path / "saved", force=True))
    saved = {f.name: f.read_bytes() for f in (path / "saved").iterdir() if f.is_file()}
    return [*found, saved]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_they_come_to_the_same(name, tmp_path) -> None:
    path = tiny.write(tmp_path / "model", CONFIGS[name] | {"vocab_size": 4096})
    found = [
        everything(Session.open(path, LoadOptions(resident=residency)), tmp_path)
        for residency in ("all", "none")
    ]
    assert found[0] == found[1]


def test_compact_has_nothing_to_free(tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    session = Session.open(path, LoadOptions(resident="none"))
    session.collect(CollectOptions(DATA))
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    assert not session.info().compactable
    with pytest.raises(StateError, match="on disk"):
        session.compact()
