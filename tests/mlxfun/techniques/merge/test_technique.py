"""Merging through a session: staged, measured, applied, undone and saved like a prune."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.context import SILENT, Context
from mlxfun.data.expert_lists import write_expert_list
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, PlanError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.merge.technique import _sequences
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from tests.mlxfun import tiny_checkpoints

DATA = DatasetOptions("demo:mixed", max_samples=4, max_tokens=32)
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=2, max_tokens=32),))
PROMPT = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]]
MERGE = MergeOptions(DATA, n_prune=4)


def logits(session) -> np.ndarray:
    return np.array(session.model(mx.array(PROMPT)).astype(mx.float32))


def test_a_merge_is_staged_previewed_applied_undone_redone_and_saved(session, tmp_path):
    base, state = logits(session), session.state
    report = session.merge(MERGE)
    assert session.state == state, "staging does not change the committed state"
    assert (report.technique, report.experts_before, report.experts_after) == ("merge", 16, 12)
    assert report.bytes_after < report.bytes_before
    merged = logits(session)
    session.flip()
    assert np.array_equal(logits(session), base)
    session.flip()
    assert np.array_equal(logits(session), merged)
    preview = session.preview(EVAL)
    session.apply(ApplyOptions())
    assert session.editor.history.bytes_held == 0, "what the checkpoint holds is let go"
    assert session.state == report.state_after
    assert session.evaluate(EVAL).perplexity == preview.perplexity
    assert np.array_equal(logits(session), merged), "measuring the checkpoint came and went"
    session.undo()
    assert np.array_equal(logits(session), base)
    assert session.state == state
    assert session.editor.history.bytes_held > 0, "redo needs what the edit made"
    session.redo()
    assert np.array_equal(logits(session), merged)
    saved = session.save(SaveOptions(tmp_path / "merged"))
    assert saved.experts == 12
    check_saved(tmp_path / "merged", report, merged)


def check_saved(path, report, merged) -> None:
    metadata = json.loads((path / "ream_metadata.json").read_text())
    assert not (path / "reap_metadata.json").exists()
    assert (metadata["method"], metadata["original_num_experts"]) == ("ream", 16)
    assert (metadata["merged_num_experts"], metadata["metric"]) == (12, "reap_sum")
    for layer, groups in metadata["group_map"].items():
        assert metadata["centroid_map"][layer] == list(report.kept[int(layer)])
        assert sorted(e for members in groups.values() for e in members) == list(range(16))
        assert all(int(centroid) in members for centroid, members in groups.items())
    model, _ = load_model(path)
    weight = model.layers[0].mlp.switch_mlp.up_proj.weight
    assert (weight.dtype, weight.shape[0]) == (mx.bfloat16, 12)
    model.set_dtype(mx.float32)
    assert np.array_equal(np.array(model(mx.array(PROMPT))), merged)


def test_it_compares_experts_on_what_collect_ran_and_never_on_what_judges_it():
    session = Session.open("demo")
    with pytest.raises(StateError, match="merge compares experts on the text of the last collect"):
        session.merge(MergeOptions(n_prune=4))
    session.collect(CollectOptions(DATA))
    state = session.merge(MergeOptions(n_prune=4)).state_after
    ran, held = session._workspace.calibration, session._workspace.held_out.sequences
    both = _sequences(session._workspace, replace(DATA, max_samples=None), SILENT)
    seen = {sequence.tobytes() for sequence in both}
    assert {sequence.tobytes() for sequence in ran} <= seen
    assert not {sequence.tobytes() for sequence in held} & seen
    assert session.merge(MergeOptions(n_prune=4)).state_after == state
    session.close()


def test_the_same_merge_again_has_the_same_state(session):
    first = session.merge(MERGE).state_after
    session.discard()
    assert session.merge(MERGE).state_after == first
    assert session.merge(replace(MERGE, alignment="none")).state_after != first


def test_prune_then_merge_then_prune_in_one_history(session, tmp_path):
    session.collect(CollectOptions(DATA))
    states = [(session.state, logits(session))]
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    states.append((session.state, logits(session)))
    session.merge(replace(MERGE, n_prune=2))
    session.apply(ApplyOptions())
    states.append((session.state, logits(session)))
    session.prune(PruneOptions(n_prune=2, allow_stale=True))
    session.apply(ApplyOptions())
    pruned = logits(session)
    session.compact()
    assert np.array_equal(logits(session), pruned)
    session.save(SaveOptions(tmp_path / "out"))
    groups = json.loads((tmp_path / "out" / "ream_metadata.json").read_text())["group_map"]
    keep = json.loads((tmp_path / "out" / "reap_metadata.json").read_text())["keep_map"]
    assert {k: [int(e) for e in v] for k, v in groups.items()} == keep
    assert max(len(m) for layer in groups.values() for m in layer.values()) > 1
    session.undo()
    assert np.array_equal(logits(session), pruned)
    session.undo()
    for state, expected in reversed(states):
        assert (session.state, np.array_equal(logits(session), expected)) == (state, True)
        if session.state != states[0][0]:
            session.undo()


def test_model_wide_merges_the_same_numbers_in_every_layer(session):
    report = session.merge(replace(MERGE, model_wide=True, ignore_experts=(0, 1)))
    gone = set(report.pruned.values())
    assert len(gone) == 1
    assert not {0, 1} & set(gone.pop())


def test_an_expert_list_names_the_centroids(session, tmp_path):
    keep = {i: tuple(range(i % 2, 16, 2)) for i in session.anatomy.indices}
    write_expert_list(tmp_path / "keep.json", keep, 16)
    report = session.merge(replace(MERGE, n_prune=None, expert_list=tmp_path / "keep.json"))
    assert report.kept == keep
    assert session.editor.staged.command == (
        f"merge --dataset demo:mixed --max-samples 4 --max-tokens 32 "
        f"--expert-list {tmp_path / 'keep.json'}"
    )


class StopAtTheSecondLayer(Context):
    def __init__(self) -> None:
        self.merged = 0

    def progress(self, label, done, total=None, unit="") -> None:
        self.merged = done if label == "merging" else self.merged

    def check(self) -> None:
        if self.merged == 2:
            raise Cancelled("cancelled")


def test_a_cancelled_merge_leaves_the_model_and_the_staged_plan(session):
    session.collect(CollectOptions(DATA))
    session.prune(PruneOptions(n_prune=2))
    staged, state = logits(session), session.state
    with pytest.raises(Cancelled):
        session.merge(MERGE, StopAtTheSecondLayer())
    assert session.editor.staged.plan.technique == "prune"
    assert np.array_equal(logits(session), staged)
    assert session.state == state


def test_steering_is_off_while_merging_and_on_afterwards(session):
    plain = session.merge(MERGE).state_after
    session.discard()
    session.steer(SteerOptions(deactivate={2: (0, 1, 2)}))
    steered = logits(session)
    assert session.merge(MERGE).state_after == plain
    session.discard()
    assert np.array_equal(logits(session), steered)


def test_too_little_memory_is_refused_with_the_figures(session, monkeypatch):
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: 1 << 20)
    before = logits(session)
    with pytest.raises(
        BudgetError, match=r"merging needs about .*iB on top of .* over the 1.0 MiB"
    ):
        session.merge(MERGE)
    assert session.editor.staged is None
    assert np.array_equal(logits(session), before)


def test_a_plan_tells_the_peak_of_its_own_making(session):
    gc.collect()  # sessions of other modules would go while this one counts
    active = mx.get_active_memory()
    merged = session.merge(MERGE)
    assert merged.peak_bytes > active + merged.delta_bytes
    session.discard()
    pruned = session.select(SelectOptions(drop={0: (1,)}))
    assert active <= pruned.peak_bytes < merged.peak_bytes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_prune": None}, UsageError, "say how many experts are merged away with --n-prune"),
        ({"n_prune": 15}, PlanError, "at most --n-prune 14 is possible"),
        ({"n_prune": 12, "max_group_size": 2}, PlanError, "take at most 4 of the 12 experts"),
        ({"max_group_size": 1}, UsageError, "--max-group-size 1 must be at least 2"),
        ({"alignment": "best"}, UsageError, "--alignment best: choose one of hungarian, greedy"),
        ({"similarity_mode": "x"}, UsageError, "--similarity-mode x: choose one of gated, average"),
        ({"ignore_experts": (99,)}, PlanError, r"the experts of this model are 0\.\.15"),
    ],
)
def test_impossible_options_are_refused_before_any_work(session, changes, error, message):
    class Never(Context):
        def check(self) -> None:
            raise AssertionError("work has begun")

    with pytest.raises(error, match=message):
        session.merge(replace(MERGE, **changes), Never())


def test_a_quantised_checkpoint_stays_quantised_and_comes_back_bit_for_bit(tmp_path):
    path = tiny_checkpoints.write(tmp_path / "q4", tiny_checkpoints.QWEN3, bits=4)
    session = Session.open(path)
    base, state = logits(session), session.state
    session.merge(replace(MERGE, n_prune=2))
    session.apply(ApplyOptions())
    merged = logits(session)
    session.save(SaveOptions(tmp_path / "out"))
    again, config = load_model(tmp_path / "out")[:2]
    assert config["num_experts"] == 6
    module = again.layers[0].mlp.switch_mlp.up_proj
    assert (module.bits, module.weight.shape[0], module.scales.dtype) == (4, 6, mx.bfloat16)
    assert np.array_equal(np.array(again(mx.array(PROMPT)).astype(mx.float32)), merged)
    session.undo()
    assert (session.state, np.array_equal(logits(session), base)) == (state, True)
    session.close()
