"""Distillation of the demo model after a prune: staged like every edit, judged on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.context import Context, Quietly
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.blocks import block_at_root
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, PlanError, StateError, UsageError
from mlxfun.events import Notice
from mlxfun.model.device import memory
from mlxfun.model.device.batch_size import batch_size
from mlxfun.techniques.distil import technique as distilling
from mlxfun.techniques.distil.local import fit_routers
from mlxfun.techniques.distil.options import DistilOptions
from mlxfun.techniques.distil.reports import Judged, Measured
from mlxfun.techniques.distil.training import Text, Trained
from mlxfun.techniques.distil.variables import variables
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.refit.least_squares import left_out
from tests.mlxfun import tiny_checkpoints as tiny

DATA = DatasetOptions("demo:mixed", max_samples=10, max_tokens=48)
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35]])
QUICK = DistilOptions(train="moe", passes=1, rate=3e-4, step_tokens=192)

LOCAL = DistilOptions(local=True, passes=2, rate=3e-4, step_tokens=64)


@pytest.fixture(scope="module")
def pruned():
    """The demo model, pruned by an eighth."""
    session = Session.open("demo")
    session.collect(CollectOptions(DATA))
    session.prune(PruneOptions(n_prune=4))
    session.apply(ApplyOptions())
    yield session
    session.close()


@pytest.fixture
def session(pruned: Session) -> Session:
    if pruned.editor.staged is not None:
        pruned.discard()
    pruned.goto(1)
    pruned.command = ""
    return pruned


def weights(session: Session) -> dict[str, bytes]:
    tree = session.editor.resident.tree
    return {p: np.array(tree.get(p).astype(mx.float32)).tobytes() for p in tree.paths}


class Heard(Context):
    """Hears notices; cancels after some steps."""

    def __init__(self, steps: int = 10**9) -> None:
        self.notices: list[str] = []
        self.steps = self.done = 0
        self.most = steps

    def emit(self, event) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.text)

    def progress(self, label, done, total=None, unit="") -> None:
        if label == "distilling":
            self.done = done

    def check(self) -> None:
        if self.done >= self.most:
            raise Cancelled("cancelled")


def test_it_is_staged_flipped_applied_saved_and_undone_like_every_edit(session, tmp_path) -> None:
    before, state = weights(session), session.state
    heard = Heard()
    report = session.distil(QUICK, heard)
    held = report.held_out
    assert held.after.kl < held.before.kl
    assert report.fitted.after.kl < report.fitted.before.kl
    assert held.perplexity < held.after.perplexity
    assert any(line.startswith("step ") and "held-out KL" in line for line in heard.notices)
    assert any("more calibration text" in line for line in report.warnings)
    logits = session.model(TOKENS)
    session.flip()
    assert weights(session) == before
    session.apply(ApplyOptions())
    assert mx.array_equal(session.model(TOKENS), logits)
    session.save(SaveOptions(tmp_path / "m"))
    assert (tmp_path / "m" / "distil_metadata.json").is_file()
    stock = load(str(tmp_path / "m"))[0]
    stock.set_dtype(mx.float32)
    assert mx.array_equal(stock(TOKENS), logits)
    session.undo()
    assert (weights(session), session.state) == (before, state)


def test_the_figures_are_those_of_the_staged_weights_whoever_asks(session) -> None:
    state = session.distil(QUICK).state_after
    session.discard()
    report = session.distil(QUICK)
    assert report.state_after == state
    workspace = session._workspace
    work = distilling._Distillation(
        workspace, QUICK, workspace.held_out, workspace.held_out, Context()
    )
    text = work._seen(workspace.held_out)
    again = text.judged(workspace, distilling.Delta(()))
    assert again.kl == pytest.approx(report.held_out.after.kl, rel=1e-6)
    assert again.perplexity == pytest.approx(report.held_out.after.perplexity, rel=1e-6)


def test_a_cancel_stages_the_best_so_far_and_says_so(session) -> None:
    report = session.distil(QUICK, Heard(steps=2))
    assert report.steps == 2 < report.planned
    assert report.held_out.after.kl < report.held_out.before.kl
    assert any(line.startswith("cancelled after 2 of") for line in report.warnings)


def test_a_cancel_ahead_of_anything_better_leaves_all_as_it_was(session) -> None:
    before = weights(session)
    with pytest.raises(Cancelled):
        session.distil(QUICK, Heard(steps=0))
    assert session.editor.staged is None
    assert weights(session) == before


def test_training_that_makes_held_out_text_worse_stages_nothing(session) -> None:
    with pytest.raises(PlanError, match=r"did not lower the KL on held-out text .*--rate"):
        session.distil(DistilOptions(rate=1.0, passes=1, step_tokens=192))
    assert session.editor.staged is None


def judged_by_what_it_is_fitted_on(session: Session, monkeypatch) -> None:
    """Little text teaches a small model nothing that holds elsewhere."""
    observations = session._workspace.observations
    text = distilling.EvalSet("the same", tuple(observations.calibration))
    monkeypatch.setattr(observations, "held_out", text)


def fits(session: Session):
    workspace = session._workspace
    with workspace.editor.live("base"), workspace.editor.unsteered():
        split = batch_size(workspace.model, workspace.anatomy).split(list(workspace.calibration))
        return fit_routers(workspace, split, LOCAL)


def test_the_local_form_fits_each_router_to_the_checkpoints_output(session, monkeypatch) -> None:
    judged_by_what_it_is_fitted_on(session, monkeypatch)
    before = weights(session)
    report = session.distil(LOCAL)
    assert any(after < was for was, after in report.errors.values())
    assert all(after <= was for was, after in report.errors.values())
    assert report.held_out.after.kl < report.held_out.before.kl
    assert "of the way" in report.warnings[0]
    session.discard()
    assert weights(session) == before


def test_the_local_form_begins_at_what_the_checkpoint_and_the_edit_differ_by(session) -> None:
    """The error before any fit, against the layer's block run whole with and without the prune."""
    errors, workspace, layer = fits(session).errors, session._workspace, session.anatomy.layers[0]
    block: Any = workspace.resident.tree.modules[layer.block]
    seen = []
    with workspace.taps.recording(inputs=True, logits=True, positions=[0]) as recording:
        for tokens in workspace.calibration:
            session.model(mx.array(tokens)[None])
            ((record,),) = recording.drain()
            seen.append(record.inputs.reshape(-1, record.inputs.shape[-1]))
    out = mx.array(np.flatnonzero(left_out(sum(len(x) for x in seen))).astype(np.uint32))
    x = mx.concatenate(seen)[out]
    now = np.array(block(x).astype(mx.float32))
    with block_at_root(session.editor, 0):
        wanted = np.array(block(x).astype(mx.float32))
    error = float(((now - wanted) ** 2).sum() / (wanted**2).sum())
    assert errors[layer.index][0] == pytest.approx(error, rel=1e-2)


def test_a_local_fit_that_makes_held_out_text_worse_stages_nothing(session) -> None:
    with pytest.raises(PlanError, match=r"KL on held-out text rose .*without --local"):
        session.distil(LOCAL)
    assert session.editor.staged is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (DistilOptions(train="moe", local=True), "--local fits routers alone"),
        (DistilOptions(rate=2.0), "--rate 2 must be"),
        (DistilOptions(passes=0), "--passes 0"),
    ],
)
def test_options_that_go_together_badly_are_refused(session, options, said) -> None:
    with pytest.raises(UsageError, match=said):
        session.distil(options)


def test_the_checkpoint_itself_has_nothing_to_be_distilled(session) -> None:
    session.goto(0)
    with pytest.raises(StateError, match="prune, narrow or merge first"):
        session.distil(QUICK)
    session.prune(PruneOptions(n_prune=4))
    with pytest.raises(StateError, match="apply the staged plan first"):
        session.distil(QUICK)


def test_what_does_not_fit_in_memory_is_refused_with_the_remedy(session, monkeypatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: int(mx.get_active_memory()) + 1000)
    with pytest.raises(BudgetError, match=r"distilling needs .*--step-tokens.*--train router"):
        session.distil(QUICK)


def test_the_estimate_is_near_the_peak(session) -> None:
    workspace = session._workspace
    work = distilling._Distillation(
        workspace,
        QUICK,
        distilling.EvalSet("text", tuple(workspace.calibration)),
        workspace.held_out,
        Context(),
    )
    need = work._estimate(variables(workspace.map, workspace.resident, "moe"))
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    session.distil(QUICK)
    used = mx.get_peak_memory() - before
    assert 0.5 * used <= need.staged <= 3 * used


def test_packed_experts_are_trained_by_their_routers_alone(tmp_path: Path) -> None:
    session = Session.open(tiny.write(tmp_path / "m", tiny.QWEN3, bits=4))
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=2, max_tokens=12)))
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    with pytest.raises(PlanError, match=r"packed weights have no gradient; use --train router"):
        session.distil(QUICK)
    # A random model learns nothing that holds elsewhere: it is judged on what it is trained on.
    text = tuple(session._workspace.calibration)
    session._workspace.observations.held_out = distilling.EvalSet("the same", text)
    report = session.distil(DistilOptions(passes=3, rate=2e-3))
    assert report.held_out.after.kl < report.held_out.before.kl
    logits = session.model(TOKENS)
    session.apply(ApplyOptions())
    session.save(SaveOptions(tmp_path / "saved"))
    session.close()
    saved = Session.open(tmp_path / "saved")
    assert mx.array_equal(saved.model(TOKENS), logits)
    saved.close()


def judged(before: float, after: float) -> Judged:
    return Judged(4, Measured(before, 2.0), Measured(after, 2.0), 1.9)


@pytest.mark.parametrize(
    ("held", "fitted", "best", "said"),
    [
        (0.95, 0.6, 30, "more calibration text would help"),
        (0.7, 0.68, 20, "would help little"),
        (0.7, 0.68, 30, "more --passes may help"),
    ],
)
def test_it_says_whether_more_text_would_help(held, fitted, best, said) -> None:
    one = Measured(1.0, 2.0)
    trained = Trained({}, one, one, steps=30, planned=30, best=best, end="done")
    assert said in distilling.more_text(judged(1.0, held), judged(1.0, fitted), trained)


def test_a_part_of_a_text_keeps_each_samples_own_states(session) -> None:
    workspace = session._workspace
    whole = distilling.EvalSet("text", tuple(workspace.calibration))
    text = distilling._Distillation(workspace, QUICK, whole, whole, Context())._seen(whole)
    part = text.part(3)
    assert isinstance(part, Text)
    assert len(part.data.sequences) == 3
    picked = np.unique(np.linspace(0, len(whole.sequences) - 1, 3).round().astype(int))
    for new, old in enumerate(picked):
        assert mx.array_equal(part.teacher.hidden[new], text.teacher.hidden[int(old)])
    assert part.teacher.likelihood.nll.size == sum(len(s) - 1 for s in part.data.sequences)
    Quietly(Context()).check()


def test_a_model_on_disk_is_fitted_locally_to_the_same_routers(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", tiny.QWEN3)
    found = []
    for resident in ("all", "none"):
        one = Session.open(path, LoadOptions(resident=resident))
        one.collect(CollectOptions(DATA))
        one.prune(PruneOptions(n_prune=4))
        one.apply(ApplyOptions())
        found.append(fits(one))
        states = [found[-1].delta(one._workspace, share).layers for share in (1.0, 0.5)]
        assert all(states)
        if resident == "none":
            with pytest.raises(
                StateError, match=r"read from disk one at a time; use distil --local"
            ):
                one.distil(QUICK)
        one.close()
    assert found[0].errors == found[1].errors
    for position, router in found[0].routers.items():
        assert mx.array_equal(router["weight"], found[1].routers[position]["weight"])
    assert found[0].routers
