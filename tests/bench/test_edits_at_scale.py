"""Stage, flip, apply, undo, redo at 94 layers x 512 experts: the work of a prune is its indices.

Run with `pytest -n 0 -m bench tests/bench/test_edits_at_scale.py -s`; the times are printed.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from rigs import make_rig

from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from mlxfun.editing.editor import Editor
from mlxfun.model.export import ExportView
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.prune.technique import Prune
from mlxfun.techniques.technique import stage

LAYERS, EXPERTS = 94, 512


@pytest.mark.bench
def test_every_step_of_a_prune_at_94_by_512(capsys):
    model, config = tiny_models.build(
        "qwen3_moe",
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        moe_intermediate_size=8,
    )
    r = make_rig(model, config)
    editor = Editor(r.resident, r.taps, "checkpoint", "load", None)
    update = np.random.default_rng(0).random((LAYERS, len(SUMS), EXPERTS))
    stats = RoutingStats.empty(r.anatomy.indices, EXPERTS, state=editor.state).plus(update, 1, 1)
    workspace = SimpleNamespace(
        editor=editor,
        anatomy=r.anatomy,
        resident=r.resident,
        stats=stats,
        source_commands=(),
        export=lambda: ExportView(model, r.resident, r.anatomy, {}),
    )
    options = PruneOptions(n_prune=EXPERTS // 4)

    steps = {
        "stage": lambda: stage(workspace, Prune().plan(workspace, options)),
        "flip": editor.flip,
        "flip back": editor.flip,
        "apply": lambda: editor.apply({}),
        "undo": editor.undo,
        "redo": editor.redo,
    }
    times = {}
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        times[name] = (time.perf_counter() - began) * 1000
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()))
    assert len(editor.committed[0]) == EXPERTS - EXPERTS // 4
