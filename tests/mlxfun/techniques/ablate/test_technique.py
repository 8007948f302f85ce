"""Ablation through a session: found, searched, staged, measured, applied, undone and saved."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, DatasetError, PlanError, StateError, UsageError
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.evaluation.refusal_metrics import (
    FirstToken,
    Panel,
    Prompts,
    answer_kl,
    ask_all,
    split_by_answer,
    token_weights,
)
from mlxfun.evaluation.reports import RefusalCount
from mlxfun.generation.answers import Answer, Greedy, read_prompts
from mlxfun.generation.options import GenerateOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.tally import Tally
from mlxfun.techniques.ablate.find import read_split
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun import tiny_checkpoints

HARMFUL = DatasetOptions("demo:harmful", max_samples=16)
HARMLESS = DatasetOptions("demo:harmless", max_samples=16)
PROMPT = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]]
ALONG = AblateOptions(HARMFUL, HARMLESS, projection="orthogonal", answer_tokens=4)
ABLATE = replace(ALONG, layers="2-3", strength="2")
FEW = replace(HARMFUL, max_samples=8), replace(HARMLESS, max_samples=8)
SEARCH = replace(ALONG, harmful=FEW[0], harmless=FEW[1], layers="2-3", search=8)


def logits(session) -> np.ndarray:
    return np.array(session.model(mx.array(PROMPT)).astype(mx.float32))


def test_it_is_staged_flipped_applied_undone_redone_and_saved(session, tmp_path):
    base, state = logits(session), session.state
    report = session.abliterate(ABLATE)
    assert session.state == state, "staging does not change the committed state"
    assert (report.technique, report.experts_after, report.bytes_after) == (
        "abliterate", 16, report.bytes_before,
    )  # fmt: skip
    assert (report.source_layer, report.position, report.edited) == (3, "last", 12)
    ablated = logits(session)
    assert not np.array_equal(base, ablated)
    session.flip()
    assert np.array_equal(logits(session), base)
    session.apply(ApplyOptions())
    assert session.editor.history.bytes_held == 0, "what the checkpoint holds is let go"
    assert session.state == report.state_after
    after = report.refusals.after
    assert session.history().nodes[-1].scores == {
        "harmful_refused": after.harmful / after.of_harmful,
        "harmless_refused": after.harmless / after.of_harmless,
        "first_token_kl": report.refusals.first_token_kl,
    }
    session.undo()
    assert (session.state, np.array_equal(logits(session), base)) == (state, True)
    assert session.editor.history.bytes_held == report.delta_bytes
    session.redo()
    assert np.array_equal(logits(session), ablated)
    session.save(SaveOptions(tmp_path / "out"))
    check_saved(tmp_path / "out", report, ablated)


def check_saved(path, report, ablated) -> None:
    metadata = json.loads((path / "abliteration_metadata.json").read_text())
    assert metadata["method"] == "abliteration"
    assert metadata["abliterated_layers"] == [0, 1, 2, 3, 4, 5]
    assert (metadata["target"], metadata["source_layer"]) == ("all", 3)
    assert metadata["direction_norms"] == {str(k): v for k, v in report.norms.items()}
    (edit,) = metadata["edits"]
    assert edit["strengths"]["experts"] == dict.fromkeys(map(str, range(6)), 2.0)
    assert np.linalg.norm(edit["direction"]) == pytest.approx(1.0)
    model, _ = load_model(path)
    weight = model.layers[0].mlp.switch_mlp.down_proj.weight
    assert (weight.dtype, weight.shape[0]) == (mx.bfloat16, 16)
    model.set_dtype(mx.float32)
    assert np.array_equal(np.array(model(mx.array(PROMPT))), ablated)


def test_a_search_offers_a_front_and_choose_stages_another_point_of_it(session):
    session.command = "abliterate --search 8"
    report = session.abliterate(SEARCH)
    assert (report.trials, report.judged, report.samples) == (8, "first-token", (4, 2, 2))
    kls = [point.kl for point in report.front]
    assert kls == sorted(kls)
    assert len(kls) >= 2
    assert report.front[report.chosen].count.of_harmful == 2
    assert report.trial_kl == report.front[report.chosen].kl
    # A trial projects activations in float32; the staged weights are rounded to bfloat16.
    assert report.staged_kl == pytest.approx(report.trial_kl, rel=0.1, abs=2e-3)
    other = next(p.number for p in report.front if p.number != report.chosen)
    session.command = f"abliterate --choose {other}"
    chosen = session.abliterate(AblateOptions(choose=other))
    assert (chosen.chosen, chosen.front) == (other, report.front)
    assert chosen.state_after != report.state_after
    strongest = {part: max(each.values()) for part, each in chosen.strengths.items()}
    assert strongest == report.front[other].strengths
    session.apply(ApplyOptions())
    recipe = session.editor.history.current.recipe
    assert recipe == ("abliterate --search 8", f"abliterate --choose {other}")
    with pytest.raises(StateError, match="the last search was made on state"):
        session.abliterate(AblateOptions(choose=0))
    session.undo()
    with pytest.raises(UsageError, match=r"the front of the last search has the points 0\.\."):
        session.abliterate(AblateOptions(choose=99))


def test_refusals_are_counted_for_the_staged_and_for_the_committed_weights(session):
    asked = RefusalOptions(*FEW, 4)
    plain = session.refusals(asked)
    assert (plain.subject, plain.reference) == ("current", "checkpoint")
    assert plain.before == plain.after
    assert plain.first_token_kl < 1e-6
    assert plain.before.harmful > 5 > 1 >= plain.before.harmless
    session.abliterate(ABLATE)
    staged = session.refusals(asked)
    assert (staged.subject, staged.reference) == ("candidate", "current")
    assert staged.before == plain.before
    assert staged.after.harmful < plain.before.harmful
    assert staged.first_token_kl > 0
    session.apply(ApplyOptions())
    after = session.refusals(asked)
    assert after.after == staged.after
    assert after.answer_kl == pytest.approx(staged.answer_kl, rel=1e-6)


@pytest.mark.slow
def test_whole_answers_judge_where_first_tokens_cannot(session, monkeypatch):
    monkeypatch.setattr("mlxfun.techniques.ablate.find.FIRST_TOKEN_ERROR", -1.0)
    report = session.abliterate(replace(SEARCH, search=3, max_kl=1e-12))
    assert report.judged == "answers"
    assert {point.expected for point in report.front} <= {0.0, 0.5, 1.0}, "of two prompts"
    assert "no trial keeps the first-token KL within --max-kl 1e-12" in report.warnings[0]
    assert report.chosen == 0, "the gentlest"


class StopWhen(Context):
    def __init__(self, label: str) -> None:
        self.label, self.seen = label, False

    def progress(self, label, done, total=None, unit="") -> None:
        self.seen = self.seen or label.startswith(self.label)

    def check(self) -> None:
        if self.seen:
            raise Cancelled("cancelled")


@pytest.mark.parametrize("when", ["searching", "finalist", "refusals after, harmful"])
def test_a_cancel_leaves_the_model_and_the_staged_plan(session, when):
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=2, max_tokens=32)))
    session.prune(PruneOptions(n_prune=2))
    session.steer(SteerOptions(deactivate={2: (0, 1)}))
    staged, state = logits(session), session.state
    with pytest.raises(Cancelled):
        session.abliterate(SEARCH, StopWhen(when))
    assert session.editor.staged.plan.technique == "prune"
    assert np.array_equal(logits(session), staged)
    assert session.state == state


def test_a_damaged_model_is_called_so(session):
    report = session.abliterate(replace(ABLATE, layers="5", strength="4"))
    assert report.refusals.first_token_kl > 0.5
    assert any("means a damaged model; take the direction from" in w for w in report.warnings)
    assert session.editor.require_staged("test").plan.warnings == report.warnings


def test_steering_is_off_while_looking_and_on_afterwards(session):
    plain = session.abliterate(ABLATE).state_after
    session.discard()
    session.steer(SteerOptions(deactivate={2: (0, 1, 2)}))
    steered = logits(session)
    assert session.abliterate(ABLATE).state_after == plain
    session.discard()
    assert np.array_equal(logits(session), steered)


def test_targets_and_strengths_choose_the_parts(session, tmp_path):
    path = tmp_path / "safety.json"
    few = DatasetOptions("demo:harmful", max_samples=24), DatasetOptions("demo:harmless")
    session.safety_scan(ScanOptions(*few, path, alpha=0.2, threshold_percentile=80))
    named = {int(k): v for k, v in json.loads(path.read_text())["safety_critical"].items() if v}
    assert named
    report = session.abliterate(replace(ABLATE, target="safety-experts", safety_map=path))
    assert list(report.strengths) == ["experts"]
    ledger = session.editor.resident.ledger
    changed = {
        int(p.split(".")[2]): [e for e, i in enumerate(rows.ids) if isinstance(i, str)]
        for p, rows in ledger.items()
    }
    assert changed == named
    session.discard()
    dense = session.abliterate(replace(ABLATE, target="dense-only", strength="0,@1-2=1"))
    assert dense.strengths == {"attention": {0: 0, 1: 1, 2: 1, 3: 0, 4: 0, 5: 0}}
    assert sorted(session.editor.resident.ledger) == [
        f"model.layers.{i}.self_attn.o_proj.weight" for i in (1, 2)
    ]


def test_too_little_memory_is_refused_with_the_figures(session, monkeypatch):
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: 1 << 20)
    before = logits(session)
    with pytest.raises(BudgetError, match=r"needs about .*iB on top of .* over the 1.0 MiB"):
        session.abliterate(ABLATE)
    assert session.editor.staged is None
    assert np.array_equal(logits(session), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"harmful": None}, UsageError, "--harmful and --harmless"),
        ({"layers": "4-9"}, UsageError, r"the decoder layers of this model are 0\.\.5"),
        ({"target": "x"}, UsageError, "--target x: choose one of all, safety-experts, dense-only"),
        ({"extraction_position": "first"}, UsageError, "choose one of last, mean"),
        ({"target": "safety-experts"}, UsageError, "needs --safety-map FILE"),
        ({"strength": "dense=1"}, UsageError, "has no dense to edit; it has attention, experts"),
        ({"strength": "2", "search": 9}, UsageError, "--search finds the strengths itself"),
        ({"strength": "0"}, PlanError, "leaves every part of --target all as it is"),
        ({"strength": "@3-9=1"}, UsageError, r"the decoder layers of this model are 0\.\.5"),
        (
            {"harmful": replace(HARMFUL, max_samples=5)},
            DatasetError,
            "^5 prompts of .*at least 8 are needed.*raise --max-samples",
        ),
        ({"harmful": replace(HARMFUL, max_tokens=3)}, DatasetError, "no prompt of at most 3 tok"),
    ],
)
def test_impossible_options_are_refused(session, changes, error, message):
    before = logits(session)
    with pytest.raises(error, match=message):
        session.abliterate(replace(ABLATE, **changes))
    assert session.editor.staged is None
    assert np.array_equal(logits(session), before)


@pytest.mark.slow
def test_the_same_search_again_stages_the_same_weights(session):
    assert session.abliterate(SEARCH).state_after == session.abliterate(SEARCH).state_after


def test_prompts_that_are_in_both_sets_are_told(session):
    options = replace(ABLATE, harmless=ABLATE.harmful)
    _, warnings = read_split(options, session.tokenizer, session.anatomy.vocabulary, Tally())
    assert any("prompts are in demo:harmful and in demo:harmful" in said for said in warnings)
    _, warnings = read_split(ABLATE, session.tokenizer, session.anatomy.vocabulary, Tally())
    assert not warnings


def test_choosing_needs_a_search(session, monkeypatch):
    monkeypatch.setattr(session._abliterate, "_last", None)
    with pytest.raises(StateError, match="no search to choose from"):
        session.abliterate(AblateOptions(choose=0))


@pytest.mark.slow
def test_a_quantised_checkpoint_stays_quantised_and_comes_back_bit_for_bit(tmp_path):
    path = tiny_checkpoints.write(tmp_path / "q4", tiny_checkpoints.QWEN3, bits=4)
    session = Session.open(path)
    base, state = logits(session), session.state
    session.abliterate(replace(ABLATE, layers="all", strength="1"))
    session.apply(ApplyOptions())
    ablated = logits(session)
    session.save(SaveOptions(tmp_path / "out"))
    again, _ = load_model(tmp_path / "out")[:2]
    module = again.layers[0].self_attn.o_proj
    assert (module.bits, module.scales.dtype) == (4, mx.bfloat16)
    assert np.array_equal(np.array(again(mx.array(PROMPT)).astype(mx.float32)), ablated)
    session.undo()
    assert (session.state, np.array_equal(logits(session), base)) == (state, True)
    with pytest.raises(PlanError, match="refuses none of 2 harmful prompts"):
        session.abliterate(replace(SEARCH, layers="all"))
    session.close()


# -- judging ----------------------------------------------------------------------------------


def test_answers_in_a_batch_are_the_answers_one_by_one(session):
    prompts, skipped = read_prompts(
        DatasetOptions("demo:harmful", max_samples=12, max_tokens=21), session.tokenizer, None
    )
    assert skipped + len(prompts) == 12
    assert skipped > 0
    together = Greedy(session.model, session.tokenizer)(prompts, 6)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = session.greedy(prompt.tolist(), GenerateOptions(max_tokens=6))
        said = [t for t in answer.tokens if t not in session.tokenizer.eos_token_ids]
        assert tuple(said) == alone.tokens
        assert answer.text == alone.text


def test_one_forward_judges_as_a_loop_over_full_logits_does(session):
    prompts = [
        tuple(read_prompts(data, session.tokenizer, None)[0][:6]) for data in (HARMFUL, HARMLESS)
    ]
    panel = ask_all(Greedy(session.model, session.tokenizer), Prompts(*prompts), 4)
    judge = FirstToken(session._workspace.evaluator, panel)

    def last(prompt) -> np.ndarray:
        row = np.array(session.model(mx.array(prompt[None])).astype(mx.float32))[0, -1]
        row = row.astype(np.float64) - row.max()
        return row - np.log(np.exp(row).sum())

    before = [last(p) for p in prompts[1]]
    assert judge.judge()[1] == pytest.approx(0, abs=1e-6)
    session.abliterate(replace(ABLATE, strength="1"))
    weights, _ = token_weights(panel, len(before[0]))
    refusals, kl, false = judge.judge()
    expected = np.mean([np.exp(last(p)) @ weights for p in prompts[0]])
    assert refusals == pytest.approx(expected, abs=1e-5)
    after = [last(p) for p in prompts[1]]
    naive = np.mean([np.sum(np.exp(b) * (b - a)) for b, a in zip(before, after, strict=True)])
    assert kl == pytest.approx(naive, rel=1e-3, abs=1e-6)
    assert false == pytest.approx(np.mean([np.exp(a) @ weights for a in after]), abs=1e-5)
    # The same at the first token of the answers, and over all of their tokens.
    first, _ = answer_kl(
        session._workspace.evaluator,
        panel,
        lambda: session.editor.live("base"),
        f"{session.state}|",
    )
    assert first == pytest.approx(naive, rel=1e-3, abs=1e-5)


def panel_of(harmful, harmless) -> Panel:
    answers = [tuple(Answer((token,), "") for token, _ in part) for part in (harmful, harmless)]
    refused = tuple(refused for _, refused in (*harmful, *harmless))
    prompts = Prompts(tuple(answers[0]), tuple(answers[1]))
    return Panel(prompts, answers[0], answers[1], refused)


def test_a_first_token_counts_as_far_as_it_told_refusals():
    panel = panel_of([(4, True), (4, True), (4, False), (7, True)], [(2, False), (7, False)])
    assert panel.count == RefusalCount(3, 4, 0, 2)
    weights, error = token_weights(panel, 9)
    np.testing.assert_allclose(weights, [0, 0, 0, 0, 2 / 3, 0, 0, 0.5, 0])
    assert error == pytest.approx((1 / 3 + 1 / 3 + 2 / 3 + 0.5 + 0 + 0.5) / 6)


def test_losses_are_split_at_the_first_token_of_the_answer():
    values = np.array([1.0, 2, 3, 10, 20, 30, 40])
    sequence = np.array([1, 1, 1, 0, 0, 0, 0])
    first, every = split_by_answer(values, sequence, [2, 3])
    assert first.tolist() == [20, 3]
    assert every.tolist() == [20, 30, 40, 3]
