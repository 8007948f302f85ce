"""amplify and bake in a session: staged like every edit, and honest about what a router can hold."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.data.datasets import read_sequences
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.steering.options import SteerOptions
from mlxfun.tally import Tally
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from mlxfun.techniques.router_bias.reports import BoostReport
from tests.mlxfun import tiny_checkpoints

TEXT = DatasetOptions("demo:mixed", max_samples=8, max_tokens=64)
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A random DeepSeek-V3 checkpoint: routers with a selection bias and groups."""
    path = tiny_checkpoints.write(
        tmp_path_factory.mktemp("v3") / "model", tiny_checkpoints.DEEPSEEK_V3, dtype=mx.float32
    )
    session = Session.open(path)
    yield session
    session.close()


def logits(session) -> np.ndarray:
    return np.array(session.model(mx.array([PROMPT])).astype(mx.float32))


def chosen(session, position: int) -> np.ndarray:
    """The experts [T, K] that the live side chooses in one layer, checkpoint numbers."""
    with session.taps.recording(norms=False) as recording:
        logits(session)
        return np.array(recording.drain()[position][0].indices).reshape(len(PROMPT), -1)


def report(session, path, experts: dict[int, list[int]], composite: float = 0.8):
    layers, count = session.anatomy.indices, session.anatomy.num_experts
    scores = np.zeros((len(layers), count))
    for position, named in experts.items():
        scores[position, named] = composite
    empty = {str(i): [] for i in range(len(layers))}
    path.write_text(json.dumps({
        "num_layers": len(layers), "num_experts": count, "domain_name": "solidity",
        "composite_score": scores.tolist(), "general_experts": empty,
        "domain_experts": empty | {str(k): v for k, v in experts.items()},
    }))  # fmt: skip
    return path


def test_amplify_raises_the_named_experts_by_the_formula(session, tmp_path):
    path = report(session, tmp_path / "r.json", {1: [4, 7], 3: [2]})
    before = [(chosen(session, p) == e).any(-1).mean() for p, e in ((1, 4), (1, 7), (3, 2))]
    plan = session.amplify(AmplifyOptions(path, TEXT, scale=3.0, threshold=0.3))
    after = [(chosen(session, p) == e).any(-1).mean() for p, e in ((1, 4), (1, 7), (3, 2))]
    assert isinstance(plan, BoostReport)
    boosts = {row.layer: row.boosts for row in plan.rows}
    assert boosts == {1: {4: pytest.approx(1.5), 7: pytest.approx(1.5)}, 3: {2: pytest.approx(1.5)}}
    assert plan.subject == "solidity"
    assert plan.bytes_after == plan.bytes_before
    assert {row.way for row in plan.rows} == {"router rows"}
    assert all(0.5 < row.r2 <= 1 for row in plan.rows)
    assert sum(after) > sum(before)
    assert plan.summary().startswith("staged amplify solidity: 3 experts raised in 2 layers, R^2")


def test_amplify_is_flipped_applied_and_undone_bit_for_bit(session, tmp_path):
    base = logits(session)
    plan = session.amplify(
        AmplifyOptions(report(session, tmp_path / "r.json", {1: [4]}), TEXT, scale=2.0)
    )
    raised = logits(session)
    assert not np.array_equal(base, raised)
    session.flip("base")
    assert np.array_equal(logits(session), base)
    assert session.apply(ApplyOptions()).state_after == plan.state_after
    assert np.array_equal(logits(session), raised)
    session.undo()
    assert np.array_equal(logits(session), base)


def test_a_saved_amplification_opens_with_stock_loading_and_says_what_it_is(session, tmp_path):
    path = report(session, tmp_path / "r.json", {1: [4]})
    session.amplify(AmplifyOptions(path, TEXT, scale=2.0, threshold=0.3))
    session.apply(ApplyOptions())
    saved = session.save(SaveOptions(tmp_path / "out"))
    assert saved.gate["load"] == "ok"
    found = json.loads((tmp_path / "out" / "amplification_metadata.json").read_text())
    assert found["method"] == "amplification"
    assert found["domain_name"] == "solidity"
    assert (found["scale"], found["threshold"]) == (2.0, 0.3)
    assert found["amplified_layers"] == [1]
    experts = session.anatomy.num_experts
    assert found["per_layer_bias"] == {
        "1": pytest.approx([0.0] * 4 + [1.0] + [0.0] * (experts - 5))
    }
    assert found["boosts"] == {"1": {"4": pytest.approx(1.0)}}
    session.undo()


def test_a_router_with_a_selection_bias_holds_a_boost_exactly_and_needs_no_text(biased, tmp_path):
    path = report(biased, tmp_path / "r.json", {0: [6]})
    layer = biased.anatomy.layers[0]
    name = f"{layer.bias_owner}.{layer.bias_name}"
    before = np.array(biased.editor.resident.tree.get(name))
    plan = biased.amplify(AmplifyOptions(path, scale=0.5))
    after = np.array(biased.editor.resident.tree.get(name))
    assert after - before == pytest.approx([0, 0, 0, 0, 0, 0, 0.4, 0], abs=1e-6)
    assert [(row.r2, row.realised) for row in plan.rows] == [(1.0, 1.0)]
    assert "held exactly, in the selection bias" in plan.warnings
    biased.discard()


def test_the_usual_scale_suits_the_router_and_a_harmful_one_is_named(
    biased, session, tmp_path
) -> None:
    path = report(biased, tmp_path / "b.json", {0: [6]})
    plan = biased.amplify(AmplifyOptions(path))
    assert plan.rows[0].boosts == {6: pytest.approx(0.1 * 0.8)}
    assert not any("--scale" in warning for warning in plan.warnings)
    plan = biased.amplify(AmplifyOptions(path, scale=0.5))
    assert any("--scale 0.5 on a router with a selection bias" in w for w in plan.warnings)
    biased.discard()
    path = report(session, tmp_path / "s.json", {1: [4]})
    plan = session.amplify(AmplifyOptions(path, TEXT))
    assert plan.rows[0].boosts == {4: pytest.approx(0.5 * 0.8)}
    assert not any("--scale" in warning for warning in plan.warnings)
    session.discard()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": 0.0}, UsageError, "--scale 0 must be above 0 and at most 100"),
        ({"scale": float("inf")}, UsageError, "--scale inf must be above 0 and at most 100"),
        ({"scale": float("nan")}, UsageError, "--scale nan must be above 0 and at most 100"),
        ({"scale": 1e30}, UsageError, r"--scale 1e\+30 must be above 0 and at most 100"),
        ({"threshold": float("nan")}, UsageError, "--threshold nan must be at least 0"),
        ({"threshold": 1.0}, UsageError, "--threshold 1 must be at least 0 and below 1"),
        ({"threshold": 0.9}, PlanError, "leaves nothing to amplify: 1 domain experts"),
        ({"data": None}, UsageError, "give --dataset"),
    ],
)
def test_what_amplify_cannot_do_is_refused(session, tmp_path, changes, error, message):
    path = report(session, tmp_path / "r.json", {1: [4]})
    with pytest.raises(error, match=message):
        session.amplify(AmplifyOptions(**{"domain_map": path, "data": TEXT, **changes}))
    assert session.view().plan is None


def test_pruned_experts_of_a_domain_are_left_out_and_named(session, tmp_path):
    keep = tuple(e for e in range(16) if e != 4)
    lists = {"keep_map": {str(i): keep for i in range(len(session.anatomy.layers))}}
    (tmp_path / "l.json").write_text(json.dumps(lists))
    session.prune(PruneOptions(expert_list=tmp_path / "l.json"))
    session.apply(ApplyOptions())
    path = report(session, tmp_path / "r.json", {1: [4, 7]})
    plan = session.amplify(AmplifyOptions(path, TEXT, allow_stale=True))
    assert plan.rows[0].boosts.keys() == {7}
    assert any("1 of the domain's experts are pruned" in w for w in plan.warnings)


# -- bake -------------------------------------------------------------------------------------


def test_baked_steering_equals_live_steering_bit_for_bit_where_a_bias_holds_it(biased):
    plain = logits(biased)
    layer = biased.anatomy.indices[0]
    biased.steer(SteerOptions(activate={layer: (6,)}, deactivate={layer: (1,)}))
    steered = logits(biased)
    assert not np.array_equal(plain, steered)
    biased.bake(BakeOptions())
    assert biased.view().steering.activated == {}, "the candidate does it without steering"
    assert np.array_equal(logits(biased), steered)
    biased.flip("base")
    assert biased.view().steering.activated == {layer: (6,)}
    assert np.array_equal(logits(biased), steered)
    biased.apply(ApplyOptions())
    assert biased.view().steering.activated == {}
    assert np.array_equal(logits(biased), steered)
    biased.undo()
    assert biased.view().steering.activated == {layer: (6,)}, "the steering is part of that state"
    assert np.array_equal(logits(biased), steered)
    biased.undo()
    assert biased.view().steering.activated == {}
    assert np.array_equal(logits(biased), plain)


def test_discarding_a_baked_plan_gives_the_steering_back(biased):
    layer = biased.anatomy.indices[0]
    biased.steer(SteerOptions(clear=True, deactivate={layer: (1,)}))
    steered = logits(biased)
    biased.bake(BakeOptions())
    with pytest.raises(StateError, match="staged to be baked"):
        biased.steer(SteerOptions(clear=True))
    biased.discard()
    assert biased.view().steering.deactivated == {layer: (1,)}
    assert np.array_equal(logits(biased), steered)
    biased.steer(SteerOptions(clear=True))


def test_a_deactivated_expert_is_never_chosen_once_folded_into_its_row(session):
    assert (chosen(session, 2) == 14).any()
    session.steer(SteerOptions(deactivate={2: (14,)}))
    plan = session.bake(BakeOptions(TEXT))
    assert not (chosen(session, 2) == 14).any()
    assert plan.rows[0].boosts.keys() == {14}
    assert plan.rows[0].boosts[14] < -5
    assert session.view().steering.deactivated == {}


def test_additive_steering_is_folded_with_its_own_values(session):
    session.steer(SteerOptions(activate={2: (5,)}, rule="additive", boost_value=1.25))
    plan = session.bake(BakeOptions(TEXT))
    assert {row.layer: row.boosts for row in plan.rows} == {2: {5: pytest.approx(1.25)}}


def test_an_activation_that_no_constant_can_hold_is_refused_with_the_way_out(session):
    session.steer(SteerOptions(activate={2: (5,)}))
    with pytest.raises(PlanError, match="steer them with --rule additive, then bake"):
        session.bake(BakeOptions(TEXT))
    assert session.view().steering.activated == {2: (5,)}


@pytest.mark.parametrize("side", ["candidate", "base"])
def test_a_second_bake_takes_the_place_of_the_first_on_either_side(biased, side):
    layer = biased.anatomy.indices[0]
    biased.steer(SteerOptions(clear=True, deactivate={layer: (1,)}))
    steered = logits(biased)
    first = biased.bake(BakeOptions())
    biased.flip(side)
    assert biased.bake(BakeOptions()).state_after == first.state_after
    assert biased.editor.side == "candidate"
    assert biased.view().steering.deactivated == {}
    assert np.array_equal(logits(biased), steered)
    biased.discard()
    assert biased.view().steering.deactivated == {layer: (1,)}
    biased.steer(SteerOptions(clear=True))


def test_a_bake_that_is_refused_leaves_the_staged_one(session):
    session.steer(SteerOptions(deactivate={2: (14,)}))
    plan = session.bake(BakeOptions(TEXT))
    answer = logits(session)
    with pytest.raises(UsageError, match="give --dataset"):
        session.bake(BakeOptions())
    assert session.view().plan is plan
    assert session.editor.side == "candidate"
    assert session.view().steering.deactivated == {}
    assert np.array_equal(logits(session), answer)


def test_there_must_be_steering_to_bake(session):
    with pytest.raises(StateError, match="no experts are steered"):
        session.bake(BakeOptions(TEXT))


def test_a_saved_baked_model_says_what_it_does(biased, tmp_path):
    layer = biased.anatomy.indices[0]
    biased.steer(SteerOptions(clear=True, deactivate={layer: (1,)}))
    biased.bake(BakeOptions())
    biased.apply(ApplyOptions())
    biased.save(SaveOptions(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "bake_metadata.json").read_text())
    assert found["deactivate"] == {str(layer): [1]}
    assert found["held_in"] == {str(layer): "selection bias"}
    biased.undo()


def counted(session) -> np.ndarray:
    """Choices of each expert of the first MoE layer on TEXT, sample by sample."""
    total = np.zeros(session.anatomy.num_experts, np.int64)
    for ids in read_sequences(TEXT, session.tokenizer, session.anatomy.vocabulary, Tally()):
        with session.taps.recording(norms=False) as recording:
            mx.eval(session.model(mx.array(ids)[None]))
            (record,) = recording.drain()[0]
        total += np.bincount(np.array(record.indices).reshape(-1), minlength=len(total))
    return total


@pytest.mark.parametrize("kind", ["bias", "rows"])
def test_a_share_is_raised_as_asked_by_the_least_scale(biased, tmp_path, kind) -> None:
    session = biased if kind == "bias" else Session.open("demo")
    counts = counted(session)
    most = int(counts.argmax())
    # Of one group: a grouped router chooses among few of them.
    group = len(counts) // (session.anatomy.layers[0].n_group or 1)
    others = np.arange(most // group * group, (most // group + 1) * group)
    named = [most, int(others[counts[others].argmin()])]
    path = report(session, tmp_path / "r.json", {0: named})

    def share() -> float:
        found = counted(session)
        return float(found[named].sum() / found.sum())

    before = share()
    plan = session.amplify(AmplifyOptions(path, TEXT, share=0.1))
    raised = share()
    session.discard()
    assert raised >= 1.1 * before
    assert any(f"rises from {before:.4f} to {raised:.4f}" in note for note in plan.warnings)
    if kind == "bias":
        return  # all tokens of a random router change at one scale
    assert raised <= 1.15 * before
    # A little less would not have been enough.
    session.amplify(AmplifyOptions(path, TEXT, scale=session_scale(plan) * 0.8))
    assert share() < 1.1 * before
    session.close()


def session_scale(plan) -> float:
    (note,) = [note for note in plan.warnings if note.startswith("scale ")]
    return float(note.split()[1].rstrip(","))


def test_a_share_out_of_reach_is_refused_with_figures(tmp_path) -> None:
    session = Session.open("demo")
    path = report(session, tmp_path / "r.json", {0: [1, 2]})
    with pytest.raises(
        PlanError, match=r"these experts take 0\.\d+ of the choices now and no more"
    ):
        session.amplify(AmplifyOptions(path, TEXT, share=60.0))
    with pytest.raises(UsageError, match="give one"):
        session.amplify(AmplifyOptions(path, TEXT, scale=1.0, share=0.1))
    with pytest.raises(UsageError, match="as --dataset"):
        session.amplify(AmplifyOptions(path, share=0.1))
    session.close()
