"""What edits say they need, against the peaks that they have, on models with H > D and in every packing.

Arrays of these models are small, but large beside what does not grow with a model.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.model.device.memory import Need, on_cpu
from mlxfun.techniques.ablate import technique as ablating
from mlxfun.techniques.merge import technique as merging
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow import technique as narrowing
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune import calibrated
from mlxfun.techniques.prune.options import PruneOptions
from tests import tiny_models
from tests.ablation_rigs import outputs_of, run_ablation
from tests.mlxfun import tiny_checkpoints as tiny
from tests.rigs import make_rig

WITHIN = 0.15
PACKED = {"2": (2, "affine"), "3": (3, "affine"), "4": (4, "affine"), "6": (6, "affine"),
          "8": (8, "affine"), "mxfp4": (4, "mxfp4")}  # fmt: skip
"""The CPU backend multiplies by packed weights slowly; a first and a last are tried each time."""

pytestmark = pytest.mark.skipif(not on_cpu(), reason="copies were counted on the CPU backend")


def checkpoint(path: Path, packing: str) -> Path:
    """A Qwen3-MoE whose experts are wider than its stream."""
    experts, top_k, layers, width = (4, 2, 2, 256) if packing else (16, 4, 4, 192)
    config = tiny.QWEN3 | {
        "hidden_size": 128, "moe_intermediate_size": width, "num_experts": experts, "head_dim": 32,
        "num_experts_per_tok": top_k, "num_hidden_layers": layers, "vocab_size": 4096,
    }  # fmt: skip
    if not packing:
        return tiny.write(path, config)
    bits, mode = PACKED[packing]
    model = tiny.build(config)
    group = 64 if mode == "affine" else 32
    model, config = quantize_model(model, copy.deepcopy(config), group, bits, mode)
    path.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(path, config["vocab_size"])
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Callable[[str], Session]]:
    """A session with a collect behind it, one at a time."""
    now: dict[str, Session] = {}

    def of(packing: str) -> Session:
        if packing not in now:
            for session in now.values():
                session.close()
            now.clear()
            path = checkpoint(tmp_path_factory.mktemp("model") / "m", packing)
            now[packing] = Session.open(path)
            now[packing].collect(CollectOptions(data(packing)))
        return now[packing]

    yield of
    for session in now.values():
        session.close()


def data(packing: str) -> DatasetOptions:
    samples, tokens = (1, 48) if packing else (3, 96)
    return DatasetOptions("demo:mixed", max_samples=samples, max_tokens=tokens)


def peak(work: Callable[[], object]) -> int:
    """The most bytes above what is in use."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


def merge(session: Session, packing: str) -> tuple[Need, Callable[[], object]]:
    options = MergeOptions(data(packing), n_prune=session.anatomy.num_experts // 4)
    kept = session.anatomy.num_experts - session.anatomy.num_experts // 4
    need = merging.estimate(merging.MergeRequest.of(session._workspace, options), kept)
    return need, lambda: session.merge(options)


def prune(session: Session, packing: str) -> tuple[Need, Callable[[], object]]:
    count = session.anatomy.num_experts // 4
    options = PruneOptions(n_prune=count, metric="output_error", refit_experts=True)
    need = calibrated.estimate(session._workspace, options)
    return need, lambda: session.prune(options)


def narrow(session: Session, packing: str) -> tuple[Need, Callable[[], object]]:
    options = NarrowOptions(fraction=0.5, requantize=bool(packing))
    workspace = session._workspace
    need = narrowing._Narrowing.of(workspace, options, workspace.calibration).estimate()
    return need, lambda: session.narrow(options)


@pytest.mark.parametrize("edit", [merge, prune, narrow])
@pytest.mark.parametrize(
    "packing",
    ["", "mxfp4", "3", *(pytest.param(p, marks=pytest.mark.slow) for p in ("2", "4", "6", "8"))],
)
def test_a_pass_needs_what_is_said(packing, edit, opened) -> None:
    session = opened(packing)
    need, work = edit(session, packing)
    used = peak(work)
    session.discard()
    assert need.staged == pytest.approx(used, rel=WITHIN)


@pytest.mark.parametrize("packing", ["", *PACKED])
def test_an_ablation_needs_what_is_said(packing: str) -> None:
    model, config = tiny_models.build(
        "qwen3_moe", hidden_size=128, moe_intermediate_size=192, num_experts=16, num_hidden_layers=4
    )
    if packing:
        bits, mode = PACKED[packing]
        model.set_dtype(mx.bfloat16)
        group = 64 if mode == "affine" else 32

        def packs(_: str, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0

        nn.quantize(model, group_size=group, bits=bits, mode=mode, class_predicate=packs)
        mx.eval(model.parameters())
    rig = make_rig(model, config)
    need = ablating.estimate(rig.resident, outputs_of(rig))
    # The host runs ahead of MLX's thread, or on a busy machine it does not, and then one array less
    # is alive at the top (6.9 instead of 8.6 MB, seen twice): what is needed is the most of some runs.
    used = max(peak(lambda: run_ablation(rig)) for _ in range(3))
    assert need.staged == pytest.approx(used, rel=WITHIN)


def test_a_refitted_merge_needs_at_most_a_little_less_than_is_said(opened, monkeypatch) -> None:
    session = opened("")
    # What judges on held-out text sizes its batches by what is free.
    monkeypatch.setattr(session._workspace.observations, "held_out", None)
    options = MergeOptions(data(""), n_prune=4, refit_experts=True, auto=True)
    need = merging.estimate(merging.MergeRequest.of(session._workspace, options), 12)
    used = peak(lambda: session.merge(options))
    session.discard()
    assert used <= need.staged <= 1.3 * used
