"""No step of load, prune, evaluate or save holds a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun import tiny_checkpoints as tiny

DATA = DatasetOptions("demo:mixed", max_samples=2, max_tokens=24)
SHARE = 0.25


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 layers, nearly all of it experts; 40 MB as they are held on the CPU."""
    shape = {"num_hidden_layers": 12, "num_experts": 16, "moe_intermediate_size": 256}
    return tiny.write(tmp_path_factory.mktemp("large") / "m", tiny.QWEN3 | shape, shards=3)


def peak(work: Callable[[], object]) -> int:
    """The most bytes above what was in use before."""
    mx.clear_cache()
    before = int(mx.get_active_memory())
    mx.reset_peak_memory()
    work()
    return int(mx.get_peak_memory()) - before


def test_no_step_holds_a_second_copy(large: Path, tmp_path: Path) -> None:
    opened: list[Session] = []
    loading = peak(lambda: opened.append(Session.open(large)))
    (session,) = opened
    size = sum(
        session.editor.resident.tree.get(p).nbytes for p in session.editor.resident.tree.paths
    )
    assert size > 30e6
    assert loading < (1 + SHARE) * size
    data = EvaluateOptions((DATA,))
    steps: dict[str, Callable[[], object]] = {
        "collect": lambda: session.collect(CollectOptions(DATA)),
        "save what was loaded": lambda: session.save(SaveOptions(tmp_path / "a")),
        "quantise while saving": lambda: session.save(SaveOptions(tmp_path / "b", quantize=4)),
        "prune": lambda: session.prune(PruneOptions(n_prune=4)),
        "preview": lambda: session.preview(data),
        "apply": lambda: session.apply(ApplyOptions()),
        "evaluate": lambda: session.evaluate(data),
        "save": lambda: session.save(SaveOptions(tmp_path / "c")),
        "undo": session.undo,
    }
    peaks = {name: peak(step) / size for name, step in steps.items()}
    session.close()
    assert {name: share for name, share in peaks.items() if share > SHARE} == {}
