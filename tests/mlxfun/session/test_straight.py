"""Edits straight to disk: the files are those of stage, apply and save, the session stays as it is,
and one layer's new tensors at a time are in memory.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing import atomic
from mlxfun.context import Context
from mlxfun.data.expert_lists import write_expert_list
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, PlanError, SaveError
from mlxfun.model.places import FromFile
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun import tiny_checkpoints as tiny
from tests.tiny_models import CONFIGS

DATA = DatasetOptions("demo:mixed", max_samples=4, max_tokens=24)
PROMPTS = (
    DatasetOptions("demo:harmful", max_samples=12, max_tokens=48),
    DatasetOptions("demo:harmless", max_samples=12, max_tokens=48),
)
TOKENS = [[3, 14, 15, 9, 26, 5, 35]]

EDITS = {
    "merge": MergeOptions(DATA, n_prune=4),
    "merge, refitted": MergeOptions(DATA, n_prune=4, refit_experts=True, auto=True),
    "prune": PruneOptions(n_prune=4),
    "prune, refitted": PruneOptions(n_prune=4, metric="output_error", refit_experts=True),
    "prune, auto": PruneOptions(n_prune=4, metric="auto", refit_experts=True),
    "narrow": NarrowOptions(width=32),
    "abliterate": AblateOptions(*PROMPTS, answer_tokens=2, strength="2"),
}
SLOW = pytest.mark.slow
QUICK = ("prune", "merge", "narrow")
STAGE = {MergeOptions: "merge", PruneOptions: "prune", NarrowOptions: "narrow",
         AblateOptions: "abliterate"}  # fmt: skip


def checkpoint(name: str, path: Path) -> Path:
    """A checkpoint of a family, "NAME" in bfloat16 or "NAME, N bit"."""
    family, _, packed = name.partition(", ")
    config = {"qwen3_moe": tiny.QWEN3, "deepseek_v3": tiny.DEEPSEEK_V3}.get(family)
    if config is None:
        config = CONFIGS[family] | {"vocab_size": tiny.VOCABULARY}
    return tiny.write(path, config, bits=int(packed.split()[0]) if packed else None)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Sessions with a collect behind them, by the name of a model; each is opened once."""
    found: dict[str, Session] = {}

    def of(name: str) -> Session:
        if name not in found:
            path = "demo"
            if name != "demo":
                path = checkpoint(name, tmp_path_factory.mktemp("model") / "m")
            found[name] = Session.open(path)
            found[name].collect(CollectOptions(DATA))
        found[name].goto(0)
        return found[name]

    yield of
    for one in found.values():
        one.close()


def stage(session: Session, edit):
    return getattr(session, STAGE[type(edit)])(edit)


def standing(session: Session) -> tuple:
    """Where a session stands: weights, steering, history, what is staged."""
    editor, tree = session.editor, session.editor.resident.tree
    arrays = {p: np.array(tree.get(p).astype(mx.float32)).tobytes() for p in tree.paths}
    history = session.editor.history.report()
    return arrays, session.state, editor.live_state, editor.side, editor.steering.key, history


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes()
            for f in directory.rglob("*") if f.is_file()}  # fmt: skip


def assert_same_files(session: Session, edit, tmp_path: Path, **how) -> None:
    before = standing(session)
    report = session.write_edit(edit, SaveOptions(tmp_path / "straight" / "m", **how))
    assert standing(session) == before
    assert [f.name for f in (tmp_path / "straight").iterdir()] == ["m"]
    planned = stage(session, edit)
    session.apply(ApplyOptions())
    saved = session.save(SaveOptions(tmp_path / "staged" / "m", **how))
    session.undo()
    assert (report.plan.kept, report.plan.state_after) == (planned.kept, planned.state_after)
    assert (report.plan.warnings, report.bytes) == (planned.warnings, saved.bytes)
    assert files(tmp_path / "straight" / "m") == files(tmp_path / "staged" / "m")


@pytest.mark.parametrize("edit", ["prune", "merge"])
def test_a_quantised_save_goes_straight_to_disk_too(edit, opened, tmp_path) -> None:
    assert_same_files(opened("demo"), EDITS[edit], tmp_path, quantize=4)


@pytest.mark.parametrize(
    ("model", "edit"),
    [pytest.param("demo", edit, marks=() if edit in QUICK else SLOW) for edit in EDITS]
    + [
        pytest.param("qwen3_moe, 4 bit", edit, marks=() if edit in QUICK else SLOW)
        for edit in EDITS
        if edit != "prune, auto"
    ],
)
def test_the_files_are_those_of_stage_apply_and_save(model, edit, opened, tmp_path) -> None:
    options = EDITS[edit]
    assert_same_files(opened(model), options, tmp_path)


# gemma4 and hunyuan hand more than hidden states from layer to layer: all edited layers stay live.
@pytest.mark.parametrize(
    ("model", "edit"),
    [
        ("deepseek_v3", "merge, refitted"),
        ("deepseek_v3, 8 bit", "prune, refitted"),
        ("gpt_oss", "merge"),
        ("gemma4_text", "merge"),
        ("hunyuan", "merge, refitted"),
        ("hunyuan", "prune, refitted"),
        ("mixtral", "prune, refitted"),
        ("dbrx", "prune"),
    ],
)
def test_of_other_families_too(model, edit, opened, tmp_path) -> None:
    assert_same_files(opened(model), EDITS[edit], tmp_path)


def test_experts_that_are_kept_as_modules_are_abliterated_too(opened, tmp_path) -> None:
    assert_same_files(opened("dbrx"), EDITS["abliterate"], tmp_path)


def test_on_top_of_an_edit_that_was_applied(opened, tmp_path) -> None:
    session = opened("hunyuan")
    stage(session, EDITS["prune, refitted"])
    session.apply(ApplyOptions())
    before = standing(session)
    more = MergeOptions(DATA, n_prune=2)
    session.write_edit(more, SaveOptions(tmp_path / "a"))
    assert standing(session) == before
    stage(session, more)
    session.apply(ApplyOptions())
    session.save(SaveOptions(tmp_path / "b"))
    assert files(tmp_path / "a").keys() == files(tmp_path / "b").keys()
    for name, content in files(tmp_path / "b").items():
        if name != "README.md":  # which begins with the name of the directory
            assert files(tmp_path / "a")[name] == content, name


def test_a_staged_plan_and_steering_stay_in_force(opened, tmp_path) -> None:
    session = opened("demo")
    session.steer(SteerOptions(activate={0: (1,)}))
    stage(session, EDITS["prune"])
    before = standing(session)
    live = np.array(session.model(mx.array(TOKENS)).astype(mx.float32))
    session.write_edit(EDITS["narrow"], SaveOptions(tmp_path / "m"))
    assert standing(session) == before
    np.testing.assert_array_equal(
        np.array(session.model(mx.array(TOKENS)).astype(mx.float32)), live
    )
    session.discard()
    session.steer(SteerOptions(clear=True))


class Stop(Context):
    """Cancels at check number `at`; counts the checks."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.checks = at, 0

    def check(self) -> None:
        self.checks += 1
        if self.checks == self.at:
            raise Cancelled("cancelled")


@pytest.mark.parametrize(("model", "edit"), [
    pytest.param("demo", "merge, refitted", marks=SLOW), pytest.param("demo", "narrow", marks=SLOW),
    ("hunyuan", "merge"), pytest.param("demo", "abliterate", marks=SLOW),
])  # fmt: skip
def test_a_cancel_leaves_model_and_disk_as_they_were(model, edit, opened, tmp_path) -> None:
    session, to = opened(model), SaveOptions(tmp_path / "new" / "m")
    before, count = standing(session), Stop()
    session.write_edit(EDITS[edit], to, count)
    shutil.rmtree(tmp_path / "new")
    for at in np.unique(np.linspace(1, count.checks, 6).round().astype(int)):
        with pytest.raises(Cancelled):
            session.write_edit(EDITS[edit], to, Stop(int(at)))
        assert list(tmp_path.iterdir()) == []
        assert standing(session) == before


@pytest.mark.parametrize("edit", ["merge", pytest.param("prune, auto", marks=SLOW), "abliterate"])
def test_a_full_disk_at_any_layer_leaves_all_as_it_was(edit, opened, tmp_path, monkeypatch) -> None:
    session, real = opened("demo"), mx.save_safetensors
    before, files_made = standing(session), {"merge": 6, "prune, auto": 12, "abliterate": 12}[edit]
    for working in (0, 2, files_made - 1):
        written = []

        def save(file, arrays, written=written, working=working) -> None:
            if len(written) == working:
                raise RuntimeError("[write] Unable to write 5 bytes to file.")
            written.append(file)
            real(file, arrays)

        monkeypatch.setattr(mx, "save_safetensors", save)
        with pytest.raises(SaveError, match=r"could not be written: .*Unable to write"):
            session.write_edit(EDITS[edit], SaveOptions(tmp_path / "m"))
        assert list(tmp_path.iterdir()) == []
        assert standing(session) == before


def test_what_a_killed_run_leaves_is_swept_by_the_next(opened, tmp_path) -> None:
    session = opened("demo")

    seen: set[str] = set()

    class Look(Context):
        def check(self) -> None:
            seen.update(path.name for path in tmp_path.iterdir())

    session.write_edit(EDITS["merge"], SaveOptions(tmp_path / "m"), Look())
    hidden = seen - {"m"}
    assert len(hidden) == 2  # the scratch, and the directory that becomes the model
    assert all(atomic._TEMPORARY.fullmatch(name) for name in hidden)


def test_a_place_that_must_not_be_written_to_is_refused_ahead_of_the_work(opened, tmp_path) -> None:
    session = opened("demo")
    (tmp_path / "mine.txt").write_text("precious")
    count = Stop()
    with pytest.raises(SaveError, match="is not empty"):
        session.write_edit(EDITS["merge"], SaveOptions(tmp_path), count)
    with pytest.raises(SaveError, match="holds no model"):
        session.write_edit(EDITS["merge"], SaveOptions(tmp_path, force=True), count)
    assert count.checks == 0
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_disk_space_is_asked_for_ahead_of_the_work(opened, tmp_path, monkeypatch) -> None:
    session, real = opened("demo"), shutil.disk_usage

    def usage(path):
        return real(path)._replace(free=22 << 20)  # the model's size and the margin, no scratch

    monkeypatch.setattr(shutil, "disk_usage", usage)
    count = Stop()
    for edit in ("merge", "abliterate"):
        with pytest.raises(BudgetError, match="of disk space"):
            session.write_edit(EDITS[edit], SaveOptions(tmp_path / "m"), count)
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_changes_nothing_writes_nothing(opened, tmp_path) -> None:
    session, everything = opened("demo"), tmp_path / "all.json"
    layers, experts = session.anatomy.indices, session.anatomy.num_experts
    write_expert_list(everything, dict.fromkeys(layers, tuple(range(experts))), experts)
    with pytest.raises(PlanError, match="the plan changes nothing"):
        session.write_edit(PruneOptions(expert_list=everything), SaveOptions(tmp_path / "m"))
    assert [f.name for f in tmp_path.iterdir()] == ["all.json"]


# -- memory -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """24 layers whose experts are most of the model."""
    config = tiny.QWEN3 | {"num_hidden_layers": 24, "num_experts": 16, "moe_intermediate_size": 96}
    session = Session.open(tiny.write(tmp_path_factory.mktemp("deep") / "m", config))
    session.collect(CollectOptions(DATA))
    yield session
    session.close()


def peak(session: Session, work) -> int:
    """The most bytes above what is in use."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("edit", [
    MergeOptions(DATA, n_prune=2, max_similarity_tokens=32),
    pytest.param(NarrowOptions(width=80), marks=SLOW),
    pytest.param(PruneOptions(n_prune=2, metric="output_error", refit_experts=True), marks=SLOW),
])  # fmt: skip
def test_the_peak_is_that_of_one_layer(edit, deep, tmp_path) -> None:
    resident = deep.editor.resident
    layer = resident.expert_bytes // len(resident.layers)
    straight = peak(deep, lambda: deep.write_edit(edit, SaveOptions(tmp_path / "m")))
    report = None

    def staged() -> None:
        nonlocal report
        report = stage(deep, edit)

    both = peak(deep, staged)
    deep.discard()
    # Of a layer: its new stacks, a projection unpacked and what is made of it; the hidden states.
    assert straight < 4 * layer
    assert both > straight + 0.9 * report.delta_bytes * 22 / 24
    assert straight > layer / 4  # or nothing was measured


def test_ablation_holds_one_side_also_while_it_is_measured(deep, tmp_path, monkeypatch) -> None:
    resident, held = deep.editor.resident, []
    edit = AblateOptions(*PROMPTS, answer_tokens=2, strength="2")
    real = resident.swap

    def swap(delta, *rest, **named):
        if any(isinstance(s, FromFile) for one in delta.layers for s in one.arrays.values()):
            gc.collect()  # caches of answers that are over
            before = mx.get_active_memory()
            inverse = real(delta, *rest, **named)
            held.append(mx.get_active_memory() - before)
            return inverse
        return real(delta, *rest, **named)

    monkeypatch.setattr(resident, "swap", swap)
    deep.write_edit(edit, SaveOptions(tmp_path / "m"))
    assert len(held) >= 4  # there, back for the reference, there, back
    assert max(held) < 1 << 16


def test_the_refusal_names_the_way_that_fits(deep, tmp_path, monkeypatch) -> None:
    edit = MergeOptions(DATA, n_prune=2, max_similarity_tokens=32)
    from mlxfun.techniques.merge.technique import MergeRequest, estimate

    need = estimate(MergeRequest.of(deep._workspace, edit), 14)
    room = (need.straight + need.staged) // 2
    limit = mx.get_active_memory() + room
    monkeypatch.setattr("mlxfun.model.device.memory.memory_limit", lambda: limit)
    with pytest.raises(BudgetError, match=r"merging needs about .*; go straight to disk with --to"):
        deep.merge(edit)
    deep.write_edit(edit, SaveOptions(tmp_path / "m"))
    limit = mx.get_active_memory() + need.straight // 2
    with pytest.raises(BudgetError, match="merging needs") as refused:
        deep.merge(edit)
    assert "--to" not in str(refused.value)
    with pytest.raises(BudgetError, match="merging needs"):
        deep.write_edit(edit, SaveOptions(tmp_path / "n"))
