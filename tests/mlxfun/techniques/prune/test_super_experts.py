"""Super experts: found by their outputs on the text of the last collect, and spared where asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data import demo
from mlxfun.data.datasets import batches
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.super_experts import layer_peaks, outliers
from tests.families import spread

TEXT = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
LAYER, FACTOR = 1, 64.0


def quietest(session: Session) -> int:
    """The expert of LAYER that the fewest tokens are routed to, but some."""
    heat = session.view().heat
    assert heat is not None
    freq = heat.metrics["freq"][LAYER]
    return int(np.where(freq > 0, freq, np.inf).argmin())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, int]]:
    """The demo with one rarely chosen expert whose outputs are FACTOR times as large."""
    with closing(Session.open("demo")) as session:
        session.collect(TEXT)
        expert = quietest(session)
    folder = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(demo.model_path(), folder)
    (file,) = folder.glob("*.safetensors")
    weights = dict(mx.load(str(file)))
    name = f"model.layers.{LAYER}.mlp.experts.{expert}.down_proj.weight"
    loud = {name: weights[name] * FACTOR}
    mx.save_safetensors(str(file), weights | loud, metadata={"format": "pt"})
    with closing(Session.open(str(folder))) as session:
        session.collect(TEXT)
        yield session, expert


def test_an_outlier_stays_that_the_statistics_would_let_go(
    planted: tuple[Session, int],
) -> None:
    session, expert = planted
    free = session.prune(PruneOptions(n_prune=4, metric="freq"))
    assert expert in free.pruned[LAYER]
    spared = session.prune(PruneOptions(n_prune=4, metric="freq", super_experts="spare"))
    assert expert not in spared.pruned[LAYER]
    assert all(len(gone) == 4 for gone in spared.pruned.values())
    (note,) = (w for w in spared.warnings if "super experts stay" in w)
    assert f"L{LAYER}:E{expert} (" in note
    heat = session.view().heat
    assert heat is not None
    assert heat.protected[LAYER, expert], "the map of experts shows who is spared"
    session.discard()


@pytest.mark.parametrize("more", [{"refit_experts": True}, {"sequential": True},
                                  {"metric": "output_error"}])  # fmt: skip
def test_an_outlier_stays_in_every_kind_of_prune(
    planted: tuple[Session, int], more: dict[str, object]
) -> None:
    session, expert = planted
    options = {"n_prune": 14, "metric": "freq", "super_experts": "spare"} | more
    assert expert not in session.prune(PruneOptions(**options)).pruned[LAYER]  # type: ignore[arg-type]
    session.discard()


def test_auto_spares_them_and_can_be_told_not_to(planted: tuple[Session, int]) -> None:
    session, expert = planted
    report = session.prune(PruneOptions(n_prune=14, metric="auto"))
    assert expert not in report.pruned[LAYER]
    assert any("super experts stay" in warning for warning in report.warnings)
    session.discard()
    assert not PruneOptions(metric="auto", super_experts="ignore").spares_super_experts
    assert not PruneOptions(metric="reap").spares_super_experts


def test_what_cannot_be_is_said_before_the_text_runs(
    planted: tuple[Session, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session, _ = planted

    def never(*_: object) -> None:
        raise AssertionError("the text was run")

    monkeypatch.setattr("mlxfun.techniques.prune.super_experts.watch", never)
    with pytest.raises(PlanError, match="--n-prune 15 would leave 1 of 16"):
        session.prune(PruneOptions(n_prune=15, super_experts="spare"))
    (tmp_path / "l.json").write_text("{}")
    with pytest.raises(UsageError, match="leave out --super-experts"):
        session.prune(PruneOptions(expert_list=tmp_path / "l.json", super_experts="spare"))


def test_a_file_of_statistics_holds_no_text_to_find_them_on(tmp_path: Path) -> None:
    with closing(Session.open("demo")) as session:
        session.collect(TEXT)
        session.save_stats(tmp_path / "s.npz")
    with closing(Session.open("demo")) as bare:
        bare.load_stats(tmp_path / "s.npz")
        with pytest.raises(StateError, match=r"run `collect --dataset \.\.\.` first, or leave out"):
            bare.prune(PruneOptions(n_prune=4, super_experts="spare"))


def test_the_rule_is_the_percentile_the_tenth_of_the_largest_and_the_first_layers() -> None:
    rng = np.random.default_rng(0)
    alive = np.ones((8, 100), dtype=bool)
    peaks = rng.uniform(1, 2, (8, 100))
    peaks[0, :3] = 50, 30, 5.5  # the last is above a tenth of the largest and among the top 4
    peaks[3, 7] = 4.5  # among the top 4, but below a tenth
    peaks[5, 1], peaks[6, 1] = 40, 45  # the sixth layer of eight is of the first three quarters
    mask, threshold = outliers(peaks, alive)
    order = np.sort(peaks.ravel())
    rank = 0.995 * (len(order) - 1)
    low = int(rank)
    percentile = order[low] + (rank - low) * (order[low + 1] - order[low])
    assert threshold == pytest.approx(max(percentile, 5.0))
    expected = peaks > threshold
    expected[6:] = False
    assert np.array_equal(mask, expected)
    assert [tuple(cell) for cell in np.argwhere(mask)] == [(0, 0), (0, 1), (5, 1)]
    alive[0, 0] = False
    assert not outliers(peaks, alive)[0][0, 0]


SEQUENCES = [
    np.array([(3 * i + 7 * n + i * i) % 61 for i in range(length)], dtype=np.int32)
    for n, length in enumerate((5, 17, 9, 2))
]


def peaks_of(r, most: int) -> np.ndarray:
    found = np.zeros((len(r.anatomy.layers), r.anatomy.num_experts))
    for batch in batches(SEQUENCES, 64, most):
        mask = mx.array(batch.mask.reshape(-1).astype(np.float32))
        reduction = r.taps.reduction(
            lambda tap, record, mask=mask: layer_peaks(tap, record, mask),
            norms=False, peaks=True, join=mx.maximum,
        )  # fmt: skip
        with r.taps.telling(reduction):
            r.model(mx.array(batch.tokens))
            found = np.maximum(found, np.array(mx.stack(reduction.drain())))
    return found


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_peaks_are_those_of_each_token_alone_whatever_the_padding(rig, name) -> None:
    """Expected: from the expert outputs that a hook of its own sees, one token at a time."""
    r = rig(name)
    expected = np.zeros((len(r.anatomy.layers), r.anatomy.num_experts))
    for sequence in SEQUENCES:
        with r.taps.recording(norms=True, peaks=True) as recording:
            mx.eval(r.model(mx.array(sequence[None])))
            records = recording.drain()
        for layer in r.anatomy.layers:
            record = records[layer.position][0]
            index, weights = np.array(record.indices), np.array(record.weights.astype(mx.float32))
            peaks, norms = np.array(record.peaks), np.array(record.norms)
            assert (peaks <= norms * 1.01).all()
            assert (norms <= peaks * 1.01 * np.sqrt(512)).all()
            for place in np.ndindex(index.shape):
                if layer.router_rows > layer.num_experts and weights[place] == 0:
                    continue
                cell = layer.position, index[place]
                expected[cell] = max(expected[cell], peaks[place])
    for most in (1, 4):
        np.testing.assert_allclose(peaks_of(r, most), expected, rtol=2e-4, atol=1e-6)


def test_a_peak_is_the_largest_absolute_value_of_the_output(rig) -> None:
    r = rig("qwen3_moe")
    tokens = mx.array(SEQUENCES[1][None])
    with r.taps.recording(inputs=True, peaks=True) as recording:
        mx.eval(r.model(tokens))
        records = recording.drain()
    for layer, (record,) in zip(r.anatomy.layers, records, strict=True):
        weights = {
            name: np.array(r.resident.tree.get(f"{layer.experts}.{name}.weight"))
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        inputs, index = np.array(record.inputs)[0], np.array(record.indices)[0]
        for token, experts in enumerate(index):
            for place, e in enumerate(experts):
                gate, up = (weights[n][e] @ inputs[token] for n in ("gate_proj", "up_proj"))
                output = weights["down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up)
                found = float(record.peaks[0, token, place])
                assert found == pytest.approx(np.abs(output).max(), rel=1e-4)
