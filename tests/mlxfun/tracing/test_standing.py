"""Standing interventions: in every forward, in the history, undone and redone, named, measured off."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from tracing_rigs import Letters, bits, classes

from mlxfun import Session
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, UsageError
from mlxfun.generation.options import GenerateOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import SelectOptions
from mlxfun.techniques.router_bias.options import BakeOptions
from mlxfun.tracing.interventions import (
    add_vector,
    compose,
    drop_expert,
    force_route,
    noise,
    scale,
    scale_expert,
    zero_out,
)
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.standing import Placed, Standing, require_standing

TEXT = "def add(a, b):\n    return"
NAMES = ("layers.2.mlp.output", "layers.*.attn.heads", "layers.1-3.residual", "embed", "output")


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    opened = Session.open("demo")
    yield opened
    opened.close()


@pytest.fixture
def session(shared: Session) -> Iterator[Session]:
    shared.goto(0)
    shared.clear_interventions()
    yield shared
    if shared.editor.staged is not None:
        shared.discard()
    shared.goto(0)


def logits(session: Session) -> mx.array:
    tokens = session.tokenizer.encode(TEXT)
    out = session.model(mx.array([tokens]))
    mx.eval(out)
    return out


def answer(session: Session) -> tuple[int, ...]:
    prompt = session.tokenizer.encode(TEXT)
    return session.greedy(prompt, GenerateOptions(max_tokens=8)).tokens


@pytest.mark.parametrize("name", NAMES)
def test_it_acts_in_every_forward_as_a_trace_does_in_one(session: Session, name: str) -> None:
    plain = bits(logits(session))
    with session.trace(TEXT) as t:
        t.edit(name, scale(0.5))
        traced = t.output.save()
    session.intervene(name, scale(0.5))
    assert bits(logits(session)) == bits(traced.value) != plain
    told = session.tracer.generate(TEXT, 8).tokens
    assert answer(session)[: len(told)] == told
    session.undo()
    assert bits(logits(session)) == plain


@pytest.mark.parametrize(
    ("name", "change"),
    [("layers.2.experts", compose(*(drop_expert(e) for e in range(0, 16, 2)))), ("layers.*.router", force_route([5, 1])),
     ("layers.3.attn.weights", zero_out(heads=[0])),
     ("layers.1.residual", compose(scale(0.9), add_vector(np.ones(128), 0.3)))],
)  # fmt: skip
def test_experts_routes_and_heads_stand_as_well(session: Session, name: str, change) -> None:
    plain = bits(logits(session))
    with session.trace(TEXT) as t:
        t.edit(name, change)
        traced = t.output.save()
    session.intervene(name, change)
    assert bits(logits(session)) == bits(traced.value) != plain
    session.clear_interventions(name)
    assert bits(logits(session)) == plain


def test_it_is_a_step_of_the_history_and_named(session: Session) -> None:
    plain = logits(session)
    own = classes(session.model)
    before = session.editor.key()
    session.intervene("layers.2.mlp.output", zero_out())
    first = bits(logits(session))
    session.intervene("layers.4.residual", add_vector(np.ones(128), 2.0), "happy.safetensors")
    second = bits(logits(session))
    nodes = session.view().history.nodes
    assert "zero_out() at layers.2.mlp.output" in nodes[-2].steering
    assert "add_vector(array [128], 2) at layers.4.residual" in nodes[-1].steering
    assert session.view().steering.interventions[1].source == "happy.safetensors"
    assert "intervening: zero_out() at layers.2.mlp.output" in session.view().steering.summary()
    assert len({before, session.editor.key()}) == 2
    session.undo()
    assert bits(logits(session)) == first
    session.undo()
    assert bits(logits(session)) == bits(plain)
    assert session.editor.key() == before
    assert classes(session.model) == own
    session.redo()
    session.redo()
    assert bits(logits(session)) == second
    session.intervene("layers.2.mlp.output", scale(1.0))  # takes the place of the zeros
    assert len(session.view().steering.interventions) == 2


def test_vectors_of_one_shape_are_not_taken_for_each_other(session: Session) -> None:
    session.intervene("layers.1.residual", add_vector(np.ones(128)))
    one, key = bits(logits(session)), session.editor.key()
    session.intervene("layers.1.residual", add_vector(-np.ones(128)))
    assert session.editor.key() != key
    assert bits(logits(session)) != one


def test_measuring_the_checkpoint_and_unsteered_work_run_without_it(session: Session) -> None:
    plain = bits(logits(session))
    session.intervene("layers.2.mlp.output", zero_out())
    with session.editor.live("checkpoint"):
        assert bits(logits(session)) == plain
    with session.editor.unsteered():
        assert bits(logits(session)) == plain
    assert bits(logits(session)) != plain


def test_it_stays_through_steering_of_experts_plans_and_flips(session: Session) -> None:
    session.intervene("layers.2.mlp.output", scale(0.5))
    session.steer(SteerOptions(clear=True, activate={1: (3,)}))
    assert len(session.view().steering.interventions) == 1
    session.steer(SteerOptions(clear=True))
    both = bits(logits(session))
    session.select(SelectOptions(drop={0: (1, 2)}))
    candidate = bits(logits(session))
    session.flip()
    assert bits(logits(session)) == both != candidate
    session.flip()
    assert bits(logits(session)) == candidate
    session.discard()
    report = session.view().steering
    session.clear_interventions()
    assert bits(logits(session)) != both
    session.steer(report)  # a report puts back its own
    assert bits(logits(session)) == both


def test_a_prune_that_is_applied_keeps_it(session: Session) -> None:
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (1, 2))))
    session.apply(ApplyOptions())
    session.intervene("layers.0.experts", drop_expert(5))
    with session.trace(TEXT) as t:
        choice = t.layers[0].router.choice.save()
    assert not {1, 2} & set(np.array(choice).reshape(-1).tolist())
    with pytest.raises(UsageError, match="no live expert 1"):
        session.intervene("layers.0.router", force_route([1]))
    with pytest.raises(UsageError, match="a token has 2 experts; force 1 to 2"):
        session.intervene("layers.0.router", force_route([0, 3, 4]))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layers.2.mlp.output", lambda x: x, "a function cannot be written down"),
        ("layers.2.mlp.output", noise(1.0), "the same at every step"),
        ("layers.2.mlp.output", zero_out(positions=-1), "no fixed positions"),
        ("layers.2.mlp.outptu", zero_out(), "near are"),
        ("layers.2.mlp.output", drop_expert(1), "belongs at layers.i.experts"),
        ("layers.2.mlp.output", compose(scale(2.0), noise(1.0)), "the same at every step"),
    ],
)
def test_what_cannot_stand_is_refused_and_changes_nothing(session, name, change, words) -> None:
    plain, node = bits(logits(session)), session.view().history.current
    with pytest.raises(UsageError, match=words):
        session.intervene(name, change)
    assert bits(logits(session)) == plain
    assert session.view().history.current == node


def test_clearing_what_does_not_stand_and_baking_what_cannot_be_are_refused(session) -> None:
    session.intervene("layers.2.mlp.output", scale(0.5))
    with pytest.raises(UsageError, match=r"they stand at layers\.2\.mlp\.output"):
        session.clear_interventions("layers.9.mlp.output")
    with pytest.raises(PlanError, match="only a vector that is added"):
        session.bake(BakeOptions())


def test_a_chat_follows_it_from_the_next_answer_on(session: Session) -> None:
    said = session.chat("What is 2 + 3?", GenerateOptions(max_tokens=6)).text
    session.reset_chat()
    session.intervene("layers.4.residual", zero_out())
    other = session.chat("What is 2 + 3?", GenerateOptions(max_tokens=6)).text
    session.reset_chat()
    session.undo()
    assert session.chat("What is 2 + 3?", GenerateOptions(max_tokens=6)).text == said != other
    session.reset_chat()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "bailing_moe", "llama4", "deepseek_v3"])  # fmt: skip
def test_routing_is_recorded_as_it_is_while_experts_and_routes_are_changed(rig, name: str) -> None:
    """What chat shows and counts: the experts that ran, the weights that they were given."""
    model = rig(name)
    model.taps.attach()
    parts = Parts(model.model, model.map, Letters(), model.resident.layers)
    layer = model.anatomy.layers[-1].index
    edits = [Placed(f"layers.{layer}.experts", scale_expert(1, 0.0)),
             Placed(f"layers.{layer}.router", force_route([2]))]  # fmt: skip
    standing = Standing(parts)
    standing.install(tuple(edits))
    with model.taps.recording(logits=True) as recording:
        out = model.model(mx.array([[3, 14, 15, 9]]))
        record = recording.drain()[-1][0]
    mx.eval(out, record.arrays())
    assert (np.array(record.indices) == 2).any(-1).all()
    assert record.weights is not None
    assert np.isfinite(np.array(record.weights)).all()
    standing.install(())
    with model.taps.recording() as recording:
        plain = model.model(mx.array([[3, 14, 15, 9]]))
        record = recording.drain()[-1][0]
    assert record.weights is not None
    assert bits(plain) != bits(out)


def test_a_route_of_experts_that_are_called_one_by_one_is_forced_in_a_trace_only(rig) -> None:
    model = rig("dbrx")
    parts = Parts(model.model, model.map, Letters(), model.resident.layers)
    with pytest.raises(UsageError, match="calls its experts one by one"):
        require_standing(parts, Placed("layers.0.router", force_route([2])))
    require_standing(parts, Placed("layers.0.experts", scale_expert(1, 0.5)))


def test_a_session_that_is_closed_leaves_nothing_in_the_modules_of_mlx_lm() -> None:
    opened = Session.open("demo")
    opened.intervene("layers.2.attn.weights", zero_out(heads=[0]))
    model = opened.model
    place = vars(sys.modules[type(model.model.layers[2].self_attn).__module__])
    assert "_mlxfun_rebound" in place
    opened.close()
    assert "_mlxfun_rebound" not in place
    assert not [m for m in model.modules() if hasattr(type(m), "_mlxfun_site")]
