"""Oblique projections: what tells harmful prompts apart goes, and other text stays as it was."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from ablation_rigs import flat, outputs_of, plan_for
from rigs import Rig
from scipy.optimize import minimize

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, UsageError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.refusal_rule import is_evasive, is_refusal
from mlxfun.model.outputs import part_path
from mlxfun.techniques.ablate import oblique
from mlxfun.techniques.ablate.delta import Projector, ablate_delta, projections
from mlxfun.techniques.ablate.oblique import RIDGE, SHARES, Texts, eraser_of, erasers
from mlxfun.techniques.ablate.options import AblateOptions

HARMFUL, HARMLESS = DatasetOptions("demo:harmful"), DatasetOptions("demo:harmless")
OBLIQUE = AblateOptions(HARMFUL, HARMLESS, answer_tokens=8)
TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 3, 8, 32, 7]]


def invented(groups: int, width: int = 6) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(width, width))
    rows = {kind: rng.normal(size=(40, width)) @ mixing for kind in (*SHARES, "harmful")}
    labels = np.arange(40) % groups
    rows["harmful"] += 2 * rng.normal(size=(groups, width))[labels]
    return rows, labels


@pytest.mark.parametrize("groups", [1, 2])
def test_of_all_projections_that_remove_the_difference_it_changes_the_rest_least(groups):
    rows, labels = invented(groups)
    eraser = eraser_of(rows, labels)
    v, u = eraser.write.astype(float), eraser.read.astype(float)
    for label in range(groups):
        gap = rows["harmful"][labels == label].mean(0) - rows["answers"].mean(0)
        assert gap - (u @ gap) @ v == pytest.approx(np.zeros(6), abs=1e-4)

    def changed(flat_u: np.ndarray) -> float:
        moment = np.zeros((6, 6))
        for kind, share in SHARES.items():
            moment += (
                share / sum(SHARES.values()) * np.mean([np.outer(y, y) for y in rows[kind]], 0)
            )
        moment += RIDGE * np.trace(moment) / 6 * np.eye(6)
        each = flat_u.reshape(groups, 6)
        return float(sum(a @ moment @ b * (p @ q) for a, p in zip(each, v, strict=True)
                         for b, q in zip(each, v, strict=True)))  # fmt: skip

    wanted = {"type": "eq", "fun": lambda x: (x.reshape(groups, 6) @ v.T - np.eye(groups)).ravel()}
    best = minimize(changed, np.linalg.pinv(v).T.ravel(), constraints=[wanted], tol=1e-12)
    assert changed(u.ravel()) <= best.fun * (1 + 1e-4)
    assert changed(u.ravel()) < 0.8 * changed(np.linalg.pinv(v).T.ravel())


def test_groups_that_differ_alike_count_once():
    rows, labels = invented(1)
    assert len(eraser_of(rows, np.arange(40) // 20).write) in (1, 2)
    twice = rows | {"harmful": np.concatenate([rows["harmful"]] * 2)}
    assert len(eraser_of(twice, np.repeat([0, 1], 40)).write) == 1
    assert eraser_of(rows | {"harmful": rows["answers"]}, labels) is None


def erased(r: Rig, texts: Texts):
    """(outputs, plan of removing each part's own difference wholly)."""
    layers = {layer.index: layer for layer in r.map.layers}
    outputs = outputs_of(r)
    parts = {o.path: part_path(o, layers[o.layer]) for o in outputs}
    found = erasers(
        r.model, r.anatomy, list(dict.fromkeys(parts.values())), r.map.hidden_size, texts
    )
    each = {path: found[part] for path, part in parts.items() if part in found}
    return outputs, parts, plan_for(r, direction=(), erasers=each, strengths=flat(r, 1.0))


@pytest.mark.parametrize("name", sorted({"qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "llama4"}
                                        & set(tiny_models.RUNNABLE)))  # fmt: skip
def test_the_weights_put_out_what_the_trial_does_and_the_difference_is_gone(rig, name):
    r = rig(name)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 60, 9).astype(np.int32) for _ in range(12)]
    texts = Texts(prompts[:6], prompts[6:])
    outputs, parts, plan = erased(r, texts)
    before = r.logits(TOKENS)
    wanted = projections(outputs, plan, r.resident)
    projector = Projector(r.resident, outputs)
    with projector.attached():
        projector.set(wanted)
        tried = np.array(r.logits(TOKENS).astype(mx.float32))
        picks = texts.picks(1)[:12]
        first = next(iter(parts.values()))
        rows = oblique._outputs(r.model, r.anatomy, [first], picks, oblique.SILENT)[first]
    gap = np.array(mx.mean(rows[:6], axis=0) - mx.mean(rows[6:12], axis=0))
    size = float(np.abs(np.array(rows)).max())
    assert np.abs(gap).max() < 1e-3 * size, "the first part no longer tells the prompts apart"
    delta = ablate_delta(wanted, r.resident, lambda p: r.resident.tree.get(p).dtype)
    undo = r.resident.swap(delta)
    edited = np.array(r.logits(TOKENS).astype(mx.float32))
    assert edited == pytest.approx(tried, rel=2e-3, abs=2e-3)
    r.resident.swap(undo)
    assert mx.array_equal(before, r.logits(TOKENS), equal_nan=True).item()


def test_it_refuses_nothing_any_more_and_costs_plain_text_little(session):
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=64, max_tokens=256)))
    orthogonal = session.abliterate(replace(OBLIQUE, projection="orthogonal"))
    along = session.preview(EvaluateOptions(kl=False)).ratio
    report = session.abliterate(replace(OBLIQUE, strength="0.7"))
    assert report.projection == "oblique"
    assert report.warnings == ()
    assert report.refusals.before.harmful >= 4
    assert report.refusals.after.harmful == 0
    assert orthogonal.refusals.after.harmful > 0, "one direction of the stream is not enough"
    assert report.refusals.first_token_kl < 0.1
    ratio = session.preview(EvaluateOptions(kl=False)).ratio
    assert ratio < min(1.03, along)
    session.apply(ApplyOptions())
    state = session.state
    session.undo()
    session.redo()
    assert session.state == state


def test_without_plain_text_it_says_so_and_text_can_be_given():
    session = Session.open("demo")
    plain = session.abliterate(replace(OBLIQUE, strength="0.5"))
    assert any("no plain text is held unchanged" in w for w in plain.warnings)
    text = DatasetOptions("demo:mixed", max_samples=10, max_tokens=64)
    given = session.abliterate(replace(OBLIQUE, strength="0.5", text=text, directions=2))
    assert not any("no plain text" in w for w in given.warnings)
    assert "--text demo:mixed" in session.editor.require_staged("look").provenance.command
    session.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "2-3"}, "say where an orthogonal direction is taken"),
        ({"extraction_position": "mean"}, "say where an orthogonal direction is taken"),
        (
            {"projection": "orthogonal", "directions": 2},
            "more than 1 only with --projection oblique",
        ),
        ({"max_perplexity": 1.0}, "--max-perplexity 1 must be above 1"),
        ({"projection": "up"}, "choose one of oblique, orthogonal"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(session, changes, message):
    with pytest.raises(UsageError, match=message):
        session.abliterate(replace(OBLIQUE, **changes))


def test_prompts_that_do_not_differ_are_refused(rig):
    r = rig("qwen3_moe")
    same = [np.arange(1, 9, dtype=np.int32)] * 8
    with pytest.raises(PlanError, match="do not differ in what any part of the model puts out"):
        erased(r, Texts(same, same))


@pytest.mark.parametrize(
    ("answer", "refused", "evasive"),
    [
        ("I'm sorry, but I can't help with that.", True, False),
        ("Could you please clarify what you are looking for?", False, True),
        ("Sure! " + "First, do this. " * 20 + "However, I cannot help you further.", False, True),
        ("Sure! " + "First, do this. " * 20 + "This is illegal.", False, True),
        ("Sure! " + "First, do this. " * 20, False, False),
    ],
)
def test_an_answer_that_evades_is_told_from_a_refusal(answer, refused, evasive):
    assert (is_refusal(answer), is_evasive(answer)) == (refused, evasive)
