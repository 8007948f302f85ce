"""The session as a user relies on it: look before deciding, any step back bit for bit."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import METRICS, CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, ModelError, StateError, UsageError
from mlxfun.evaluation.evaluator import Evaluator
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.events import Notice, RoutingFrame
from mlxfun.generation.options import GenerateOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun.session.recording import Recorder

MIXED = CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48))
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=4, max_tokens=48),))
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]


@pytest.fixture(scope="module")
def shared():
    session = Session.open("demo")
    session.collect(MIXED)
    yield session
    session.close()


def logits(session) -> np.ndarray:
    out = session.model(mx.array([PROMPT]))
    return np.array(out.astype(mx.float32))


def test_staging_is_seen_applied_undone_and_redone_bit_for_bit(session):
    base, state = logits(session), session.state
    plan = session.prune(PruneOptions(n_prune=4))
    assert session.state == state, "staging does not change the committed state"
    staged = logits(session)
    assert not np.array_equal(base, staged)
    session.flip("base")
    assert np.array_equal(logits(session), base)
    session.flip("candidate")
    assert np.array_equal(logits(session), staged)
    session.apply(ApplyOptions())
    assert session.state == plan.state_after != state
    assert np.array_equal(logits(session), staged)
    session.undo()
    assert (session.state, np.array_equal(logits(session), base)) == (state, True)
    session.redo()
    assert (session.state, np.array_equal(logits(session), staged)) == (plan.state_after, True)


def test_discarding_leaves_the_model_as_it_was(session):
    base, state = logits(session), session.state
    session.prune(PruneOptions(n_prune=2))
    session.discard()
    assert np.array_equal(logits(session), base)
    assert session.state == state
    with pytest.raises(StateError, match="nothing is staged to discard"):
        session.discard()


def test_preview_gives_bit_for_bit_what_evaluate_gives_after_apply(session):
    session.prune(PruneOptions(n_prune=4))
    seen = session.preview(EVAL)
    session.apply(ApplyOptions())
    after = session.evaluate(EVAL)
    for name in ("perplexity", "interval", "kl_mean", "kl_p99", "top1_agreement", "tokens"):
        assert getattr(seen, name) == getattr(after, name), name
    assert seen.measured_state == after.measured_state == session.state
    assert seen.kl_mean > 0.01


def test_the_checkpoint_measured_against_itself_is_exactly_the_same(session):
    report = session.evaluate(EVAL)
    assert (report.kl_mean, report.kl_p99, report.top1_agreement) == (0.0, 0.0, 1.0)
    assert report.ratio == 1.0


def test_without_kl_perplexity_is_the_same_and_nothing_is_compared(session, monkeypatch):
    session.prune(PruneOptions(n_prune=4))
    session.apply(ApplyOptions())
    session.prune(PruneOptions(n_prune=2, allow_stale=True))
    whole = session.preview(EVAL)
    assert whole.vs_current is not None
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_log_probabilities", None)  # only a comparison needs them
        for ask in (session.preview, session.evaluate):
            alone = ask(replace(EVAL, kl=False))
            assert (alone.kl_mean, alone.kl_p99, alone.top1_agreement) == (None, None, None)
            assert alone.vs_current is None
            assert "KL" not in alone.summary()
            if ask == session.preview:
                assert alone.perplexity == whole.perplexity
                assert alone.interval == whole.interval
                assert alone.baseline == whole.baseline
    session.preview(replace(EVAL, kl=False))
    with pytest.raises(StateError, match=r"mean KL .* is above --max-kl 0"):
        session.apply(ApplyOptions(max_kl=0.0))
    assert session.view().scores.kl_mean == whole.kl_mean, "measured again, with KL"


def test_without_a_data_set_the_held_out_samples_are_measured(session):
    session.prune(PruneOptions(n_prune=2))
    report = session.preview(EvaluateOptions())
    assert report.datasets == ("demo:mixed (held out)",)


def test_two_ways_to_the_same_weights_are_the_same_state(session):
    both = session.prune(PruneOptions(n_prune=4)).state_after
    keep = session.editor.staged.plan.keep
    session.discard()
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    first = {layer: set(live) for layer, live in zip(session.anatomy.indices, session.editor.committed, strict=True)}  # fmt: skip
    assert all(set(keep[layer]) <= first[layer] for layer in keep)
    session.prune(PruneOptions(n_prune=2, allow_stale=True))
    assert session.editor.staged.plan.keep == keep
    assert session.apply(ApplyOptions()).state_after == both


def test_compact_frees_memory_keeps_the_state_and_is_undone_from_the_checkpoint(session):
    base = logits(session)
    session.prune(PruneOptions(n_prune=8))
    session.apply(ApplyOptions())
    pruned, state, active = logits(session), session.state, mx.get_active_memory()
    step = session.compact()
    assert session.state == state
    assert step.bytes_freed == 4_718_592  # 6 layers x 8 experts x 3 x 64 x 128 float32
    assert mx.get_active_memory() < active - 4_000_000
    node = session.history().nodes[step.node]
    assert node.bytes == 0, "what the checkpoint holds is not held twice"
    assert np.array_equal(logits(session), pruned)
    session.undo()
    session.undo()
    assert np.array_equal(logits(session), base)


def test_applying_adds_under_one_percent_and_a_hundred_cycles_add_nothing(session):
    gc.collect()  # models of earlier tests must not be freed in the middle of this one
    size = session.info().bytes
    before = mx.get_active_memory()
    session.prune(PruneOptions(n_prune=4))
    session.apply(ApplyOptions())
    mx.clear_cache()
    assert mx.get_active_memory() - before < size * 0.01
    session.undo()
    after_one = mx.get_active_memory()
    for _ in range(100):
        session.prune(PruneOptions(n_prune=4))
        session.apply(ApplyOptions())
        session.undo()
    assert mx.get_active_memory() == after_one
    assert len(session.history().nodes) < 40, "the same step from the same state is the same node"


def test_a_branch_of_the_history_can_be_visited_from_another(session):
    session.prune(PruneOptions(n_prune=3))
    a = session.apply(ApplyOptions())
    first = logits(session)
    session.undo()
    session.prune(PruneOptions(n_prune=5))
    b = session.apply(ApplyOptions())
    second = logits(session)
    assert a.node != b.node
    session.goto(a.node)
    assert np.array_equal(logits(session), first)
    session.goto(b.node)
    assert np.array_equal(logits(session), second)
    with pytest.raises(StateError, match=r"there is no history node 999; they are 0\.\."):
        session.goto(999)


def test_guardrails_preview_if_needed_and_refuse_with_the_figures(session):
    session.prune(PruneOptions(n_prune=8))
    with pytest.raises(StateError, match=r"mean KL \d\.\d+ is above --max-kl 0\.0001"):
        session.apply(ApplyOptions(max_kl=0.0001))
    with pytest.raises(
        StateError, match=r"x the checkpoint's \d+\.\d+, above --max-perplexity-ratio 1"
    ):
        session.apply(ApplyOptions(max_perplexity_ratio=1.0))
    assert session.editor.staged is not None, "a refused plan stays staged"
    node = session.apply(ApplyOptions(max_kl=50.0))
    assert session.history().nodes[node.node].scores["kl_mean"] > 0.0001


def test_pruning_without_statistics_says_what_to_run():
    fresh = Session.open("demo")
    with pytest.raises(StateError, match="run `collect --dataset"):
        fresh.prune(PruneOptions(n_prune=2))
    with pytest.raises(UsageError, match="give --dataset, or collect"):
        fresh.evaluate(EvaluateOptions())
    fresh.close()


def test_stale_statistics_are_refused_unless_asked_for(session):
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    with pytest.raises(StateError, match=r"made on state .* the model is at .* --allow-stale"):
        session.prune(PruneOptions(n_prune=2))
    session.undo()
    session.prune(PruneOptions(n_prune=2))


def test_a_failed_prune_leaves_the_staged_plan_and_the_model(session):
    session.prune(PruneOptions(n_prune=2))
    staged = logits(session)
    with pytest.raises(Exception, match="n-prune"):
        session.prune(PruneOptions(n_prune=15))
    assert session.editor.staged.report.experts_after == 14
    assert np.array_equal(logits(session), staged)


def test_undo_and_redo_at_the_ends_say_so(session):
    with pytest.raises(StateError, match="nothing to undo"):
        session.undo()
    with pytest.raises(StateError, match="nothing is staged to apply"):
        session.apply(ApplyOptions())
    session.prune(PruneOptions(n_prune=2))
    with pytest.raises(StateError, match=r"a plan is staged .*; apply or discard it before undo"):
        session.undo()


def test_statistics_of_another_model_are_refused(session, tmp_path):
    path = tmp_path / "s.npz"
    session.save_stats(path)
    with np.load(path) as data:
        changed = dict(data)
    changed["model"] = np.str_("0" * 32)
    np.savez(path, **changed)
    with pytest.raises(ModelError, match="was made on demo, not on"):
        session.load_stats(path)


def test_the_cache_of_one_side_is_not_used_for_the_other(session):
    session.chat("What is a kitchen?", GenerateOptions(max_tokens=4))
    session.prune(PruneOptions(n_prune=8))
    report = session.chat("And a garden?", GenerateOptions(max_tokens=4))
    assert (report.side, report.cached_tokens) == ("candidate", 0)
    report = session.chat("And a house?", GenerateOptions(max_tokens=4, side="base"))
    assert report.side == "base"


def test_chat_traffic_is_counted_when_asked(session, tmp_path):
    before = session.stats()
    session.set_counting(True, tmp_path / "auto.npz")
    ctx = Recorder()
    report = session.chat("What is a kitchen?", GenerateOptions(max_tokens=5), ctx)
    after = session.stats()
    run = report.prompt_tokens - report.cached_tokens + report.generated_tokens - 1
    assert after.tokens - before.tokens == run
    assert after.samples == before.samples + 1
    assert (tmp_path / "auto.npz").exists()
    assert any(isinstance(e, RoutingFrame) for e in ctx.events)
    session.prune(PruneOptions(n_prune=2))
    ctx = Recorder()
    session.chat("And a garden?", GenerateOptions(max_tokens=3), ctx)
    told = [e for e in ctx.events if isinstance(e, Notice)]
    assert ["counting stopped" in notice.text for notice in told] == [True], "once an answer"
    assert (session.stats().samples, session.stats().tokens) == (after.samples, after.tokens)
    session.collect(MIXED)


def test_cancelling_a_collect_keeps_what_was_collected(session):
    report = session.collect(MIXED, Recorder(stop_after=1))
    assert report.cancelled
    assert 0 < report.samples < report.samples_planned
    session.collect(MIXED)


def test_cancelling_between_two_layers_leaves_the_model_as_it_was(session):
    session.prune(PruneOptions(n_prune=8))
    session.apply(ApplyOptions())
    pruned, state = logits(session), session.state
    with pytest.raises(Cancelled):
        session.compact(Recorder(stop_after=3))
    assert (session.state, np.array_equal(logits(session), pruned)) == (state, True)
    assert session.editor.resident.stack[0] == tuple(range(16))


def test_why_gives_the_numbers_and_the_rank(session):
    report = session.why(2, 5)
    assert report.status == "kept"
    assert tuple(report.scores) == METRICS
    session.prune(PruneOptions(n_prune=4))
    gone = session.editor.staged.report.pruned[2][0]
    condemned = session.why(2, gone)
    assert condemned.status == "to be pruned"
    assert condemned.ranks["reap_sum"] > 12
    with pytest.raises(UsageError, match=r"layer 2 has no expert 99; they are 0\.\.15"):
        session.why(2, 99)


def test_a_session_belongs_to_its_thread(session):
    calls = {
        "undo": session.undo, "view": session.view, "stats": session.stats, "close": session.close,
        "greedy": lambda: session.greedy([1, 2], GenerateOptions(max_tokens=1)),
    }  # fmt: skip
    caught = {}

    def other() -> None:
        for name, call in calls.items():
            try:
                call()
            except StateError as error:
                caught[name] = str(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert caught.keys() == calls.keys()
    assert all("belongs to the thread that opened it" in said for said in caught.values())


def test_an_undo_budget_refuses_with_the_figures_and_keeps_the_plan():
    fresh = Session.open("demo", undo_budget=0)
    fresh.collect(MIXED)
    fresh.prune(PruneOptions(n_prune=4))
    fresh.apply(ApplyOptions())  # its inverse holds only what the checkpoint holds
    fresh.prune(PruneOptions(n_prune=2, allow_stale=True))
    with pytest.raises(
        BudgetError, match=r"over the undo budget of 0 B; raise it with --undo-budget"
    ):
        fresh.apply(ApplyOptions())
    assert fresh.editor.staged is not None
    fresh.close()


def test_the_smoke_test_passes_on_a_sound_model_and_names_what_is_broken(session):
    assert session.smoke_test().passed
    path = "model.layers.2.mlp.switch_mlp.down_proj.weight"
    whole = session.editor.resident.tree.get(path)
    session.editor.resident.tree.put(path, whole * float("nan"))
    report = session.smoke_test()
    session.editor.resident.tree.put(path, whole)
    assert not report.passed
    assert report.checks["finite logits"] == "logits hold NaN or infinity"


def test_the_view_is_plain_data_with_the_staged_experts_marked(session):
    session.prune(PruneOptions(n_prune=4))
    view = session.view()
    assert view.heat.condemned.sum() == 24
    assert view.heat.alive.all()
    assert view.plan.experts_after == 12
    assert view.model.experts_kept == 16
    session.apply(ApplyOptions())
    view = session.view()
    assert view.heat.alive.sum() == 72
    assert not view.heat.condemned.any()
    assert view.model.experts_kept == 12


def test_a_saved_model_says_how_it_was_made(session, tmp_path):
    from mlxfun.checkpoint.options import SaveOptions

    session.command = "collect --dataset demo:mixed --max-samples 6"
    session.collect(MIXED)
    session.command = "prune --n-prune 4"
    session.prune(PruneOptions(n_prune=4))
    session.preview(EVAL)
    session.apply(ApplyOptions())
    session.command = ""
    session.save(SaveOptions(tmp_path / "pruned"))
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "collect --dataset demo:mixed --max-samples 6\nprune --n-prune 4\n" in card
    assert "perplexity" in card


def test_text_longer_than_the_context_is_announced_with_its_true_size(session, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"content": "' + "word " * 2100 + '"}\n')
    ctx = Recorder()
    for limit in (2100, 512):
        session.collect(CollectOptions(DatasetOptions(str(path), max_tokens=limit)), ctx)
    said = [e.text for e in ctx.events if isinstance(e, Notice)]
    assert "the longest of 2,100: " in said[0]
    assert "the model's context is 512" in said[1]
    assert "--max-tokens 512 cuts there" in said[1]
    assert len(said) == 3, "text within the context is no reason to warn"
    sets = (DatasetOptions(str(path), max_tokens=600),)
    session.evaluate(EvaluateOptions(sets, kl=False), ctx)
    last = [e.text for e in ctx.events if isinstance(e, Notice)][-1]
    assert "the longest sample has 600 tokens, and the model's context is 512" in last
