"""Router edits and steering of a model on disk, and one expert's profile, are those of a resident one."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions
from mlxfun.events import RoutingFrame
from mlxfun.hooks import states
from mlxfun.model.places import LayerStore
from mlxfun.scans.options import ScanOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.merge.options import MergeOptions
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
    path = tiny.write(tmp_path / "model", CONFIGS[name] | {"vocab_size": tiny.VOCABULARY})
    found = [
        everything(Session.open(path, LoadOptions(resident=residency)), tmp_path)
        for residency in ("all", "none")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "edit",
    [
        MergeOptions(DATA, n_prune=4, refit_experts=True),
        PruneOptions(n_prune=4, metric="output_error", refit_experts=True),
        PruneOptions(n_prune=2),
    ],
)
def test_edits_that_go_straight_to_disk_write_the_same(edit, tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    found = []
    for residency in ("all", "none"):
        session = Session.open(path, LoadOptions(resident=residency))
        session.collect(CollectOptions(DATA))
        state = session.state
        written = session.write_edit(edit, SaveOptions(tmp_path / "saved", force=True))
        assert (session.state, session.editor.live_state) == (state, state)
        files = {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir() if f.is_file()}
        found.append((written.plan.kept, session.evaluate(EVALUATE), files))
    assert found[0] == found[1]


def test_hidden_states_in_files_change_nothing(tmp_path, monkeypatch) -> None:
    """Also where they leave no room for what runs ahead of the experts, which is computed again."""
    monkeypatch.setattr(states.States.__init__, "__defaults__", (None, 0))
    mapped, own = [], states.States._map
    monkeypatch.setattr(states.States, "_map", lambda s, *given: (mapped.append(s), own(s, *given)))
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    found = []
    for residency in ("all", "none"):
        session = Session.open(
            path, LoadOptions(resident=residency, scratch=tmp_path if residency == "none" else None)
        )
        session.collect(CollectOptions(DATA, batch_tokens=40))
        report = session.merge(MergeOptions(DATA, n_prune=4, refit_experts=True))
        found.append((report.kept, report.state_after, session.preview(EVALUATE)))
    assert mapped
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


def test_the_live_picture_fills_layer_by_layer(tmp_path) -> None:
    class Frames(Context):
        seen: ClassVar[list] = []

        def emit(self, event) -> None:
            if isinstance(event, RoutingFrame):
                self.seen.append(event)

    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    session = Session.open(path, LoadOptions(resident="none"))
    session.collect(CollectOptions(DATA, batch_tokens=40), Frames())
    first, second, *_, last = Frames.seen
    assert not first.freq[1].any()
    np.testing.assert_array_equal(first.freq[0], last.freq[0])
    np.testing.assert_array_equal(second.freq, last.freq)


def test_longer_text_is_tested_anew_in_the_same_reading(tmp_path) -> None:
    """A layer may do more on it, for instance hand on what it selected beyond a window."""
    session = Session.open(tiny.write(tmp_path / "model", tiny.QWEN3), LoadOptions(resident="none"))
    store = LayerStore.of(session.model)
    for length in (12, 30, 20):
        before = store.reads
        session.collect(CollectOptions(replace(DATA, max_tokens=length)))
        assert store.reads - before == 2
        assert store.tested == max(length, store.tested) >= 12
    assert store.tested == 30


def test_what_is_in_memory_is_said(tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    session = Session.open(path, LoadOptions(resident="none"))
    report, layers = session.residency(), LayerStore.of(session.model)
    assert layers is not None
    assert (report.whole, report.streamed) == (False, True)
    assert report.kept_bytes + layers.total == report.whole_bytes
    assert report.summary().startswith("decoder layers are on disk and are read as they run")
    with pytest.raises(StateError, match="each layer is read whole when it runs"):
        session.sweep_residency((2,), 4)
