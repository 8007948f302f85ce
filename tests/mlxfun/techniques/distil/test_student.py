"""Loss and gradient of distillation against plain mlx: a model that is really sliced, run whole, with
logits of all tokens at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten, tree_unflatten
from rigs import Rig, keep_fewer

from mlxfun.data.datasets import batches
from mlxfun.errors import ModelError
from mlxfun.evaluation.evaluator import EvalSet, Evaluator, Reference
from mlxfun.hooks.head import HeadTap
from mlxfun.model.delta import Delta
from mlxfun.model.identity import state_id
from mlxfun.techniques.distil.student import Student
from mlxfun.techniques.distil.variables import masters_of, trained_delta, variables

SEQUENCES = tuple(
    np.random.default_rng(n).integers(1, 61, length).astype(np.int32)
    for n, length in enumerate((24, 17, 30))
)
TEXT = EvalSet("text", SEQUENCES)
BATCH = batches(list(SEQUENCES), 4096, 8)[0]


def teacher_of(rig: Rig) -> tuple[Evaluator, Reference]:
    assert rig.anatomy.head is not None
    evaluator = Evaluator(rig.model, HeadTap(rig.model, rig.anatomy.head), rig.anatomy)
    return evaluator, evaluator.reference(("checkpoint", ""), TEXT)


def log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def plain_loss(model: Any, target: mx.array, params: dict[str, mx.array]) -> mx.array:
    """KL at every real token whose next one is real, of a forward of the whole batch."""
    model.update(tree_unflatten(list(params.items())))
    log_q = log_probabilities(model(mx.array(BATCH.tokens)).astype(mx.float32))
    kl = mx.sum(mx.exp(target) * (target - log_q), axis=-1)
    counted = mx.array(np.pad(BATCH.mask[:, 1:], ((0, 0), (0, 1))).astype(np.float32))
    return mx.sum(kl * counted) / mx.sum(counted)


@pytest.mark.parametrize("train", ["router", "moe"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_loss_gradient_and_first_step_are_those_of_a_plain_forward(rig, name, train) -> None:
    r = rig(name)
    target = log_probabilities(r.model(mx.array(BATCH.tokens)).astype(mx.float32))
    _, teacher = teacher_of(r)
    r.prune(keep_fewer(r.anatomy))
    plain = r.saved_and_reloaded()
    wanted = variables(r.map, r.resident, train)
    student, masters = Student(r, wanted), masters_of(wanted, r.resident)
    loss, slope = student.gradient(masters, BATCH, teacher)
    weights = dict(tree_flatten(plain.parameters()))
    params = {v.path: weights[v.path] for v in wanted}
    expected, slopes = mx.value_and_grad(partial(plain_loss, plain, target))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3, abs=2e-6)
    steps = [
        optimizers.Adam(1e-2, bias_correction=True).apply_gradients(g, p)
        for g, p in ((slope, masters), (slopes, params))
    ]
    for v in wanted:
        rows = np.arange(params[v.path].shape[0])
        if v.kind == "expert":  # the plain model has only the rows that are live
            rows = np.array(r.resident.layers[v.position].rows)
        mine, reference = np.array(slope[v.path])[rows], np.array(slopes[v.path])
        assert np.abs(mine - reference).max() <= 2e-3 * np.abs(reference).max(), v.path
        moved = (
            np.array(new[v.path] - old[v.path])
            for new, old in zip(steps, (masters, params), strict=True)
        )
        clear = np.abs(reference) > 0.05 * np.abs(reference).max()
        ours, theirs = next(moved)[rows], next(moved)
        assert np.allclose(ours[clear], theirs[clear], rtol=0.05), v.path


SOME = ("qwen3_next", "gemma4_text", "llama4", "longcat_flash", "granitemoe", "dbrx", "jamba")
ALL = [
    pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
    for name in tiny_models.RUNNABLE
    if name != "deepseek_v41"
]


@pytest.mark.parametrize("name", ALL)
def test_every_router_of_a_family_has_a_gradient(rig, name) -> None:
    r = rig(name)
    _, teacher = teacher_of(r)
    r.prune(keep_fewer(r.anatomy))
    wanted = variables(r.map, r.resident, "router")
    assert {v.position for v in wanted} == {moe.layer.position for moe in r.resident.layers}
    student = Student(r, wanted)
    loss, slope = student.gradient(masters_of(wanted, r.resident), BATCH, teacher)
    assert float(loss) > 0
    assert all(float(mx.abs(slope[v.path]).max()) > 0 for v in wanted)


def test_a_family_without_a_gradient_is_refused_in_a_sentence(rig) -> None:
    r = rig("deepseek_v41")
    _, teacher = teacher_of(r)
    wanted = variables(r.map, r.resident, "router")
    student = Student(r, wanted)
    with pytest.raises(ModelError, match=r"no gradient through deepseek_v41.*distil --local"):
        student.gradient(masters_of(wanted, r.resident), BATCH, teacher)


@pytest.mark.parametrize("mode", ["affine8", "mxfp4"])
def test_a_packed_router_is_trained_as_a_matrix_and_packed_again(rig, mode) -> None:
    r = rig("qwen3_moe", mode=mode)
    _, teacher = teacher_of(r)
    r.prune(keep_fewer(r.anatomy))
    before, state = r.logits(BATCH.tokens.tolist()), state_id("x", r.resident.ledger)
    wanted = variables(r.map, r.resident, "router")
    assert all(v.packed for v in wanted)
    masters = masters_of(wanted, r.resident)
    _, slope = Student(r, wanted).gradient(masters, BATCH, teacher)
    assert all(float(mx.abs(slope[v.path]).max()) > 0 for v in wanted)
    assert trained_delta(r, wanted, masters).layers == (), (
        "what was not trained stays packed as it is"
    )
    moved = {path: master - 0.5 * mx.sign(slope[path]) for path, master in masters.items()}
    undo = r.resident.swap(trained_delta(r, wanted, moved))
    candidate = r.logits(BATCH.tokens.tolist())
    assert not mx.array_equal(before, candidate)
    assert mx.array_equal(candidate, r.saved_and_reloaded()(mx.array(BATCH.tokens)))
    assert state_id("x", r.resident.ledger) != state
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(BATCH.tokens.tolist()))
    assert state_id("x", r.resident.ledger) == state


def test_rows_of_pruned_experts_keep_their_values_and_the_others_their_names(rig) -> None:
    r = rig("qwen3_moe")
    r.prune(keep_fewer(r.anatomy))
    wanted = variables(r.map, r.resident, "moe")
    masters = masters_of(wanted, r.resident)
    path = next(v.path for v in wanted if v.kind == "expert")
    row = r.resident.layers[0].rows[2]
    masters[path][row] += 1.0
    delta = trained_delta(r, wanted, masters)
    (layer,) = delta.layers
    assert list(layer.arrays) == [path]
    was, now = r.resident.ledger[path].ids, layer.rows[path].ids
    assert [a == b for a, b in zip(was, now, strict=True)] == [i != 2 for i in range(len(was))]
    assert isinstance(delta, Delta)
