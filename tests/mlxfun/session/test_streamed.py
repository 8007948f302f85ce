"""A model whose decoder layers stay on disk measures, edits and saves what a resident one does, bit
for bit, and holds no layer between passes.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, ModelError
from mlxfun.evaluation.options import EvaluateOptions, RefusalOptions
from mlxfun.files import writer
from mlxfun.generation.options import GenerateOptions
from mlxfun.model.places import LayerStore
from mlxfun.scans.options import ScanOptions
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions
from tests import tiny_models
from tests.mlxfun import tiny_checkpoints as tiny
from tests.tiny_models import CONFIGS, RUNNABLE

DATA = DatasetOptions("demo:mixed", max_samples=6, max_tokens=24)
COLLECT = CollectOptions(DATA, batch_tokens=48, max_batch=2)  # several batches
EVALUATE = EvaluateOptions((DatasetOptions("demo:eval", max_samples=5, max_tokens=24),), samples=0)


OTHER = DatasetOptions("demo:mixed", max_samples=3, max_tokens=16)


def checkpoint(name: str, path: Path, bits: int | None = None) -> Path:
    return tiny.write(path, with_vocabulary(CONFIGS[name]), bits=bits, shards=2)


def packed(name: str, path: Path) -> Path:
    """The family in 4 bits, with dimensions that are wide enough for it."""
    vocabulary = "num_vocab" if "num_vocab" in CONFIGS[name] else "vocab_size"
    model, config = tiny_models.build(name, wide=True, **{vocabulary: tiny.VOCABULARY})
    model.set_dtype(mx.bfloat16)
    return tiny.save(path, model, tiny_models.quantise(model, config, "affine4"), shards=2)


def with_vocabulary(config: dict) -> dict:
    """The config with as many tokens as the bundled tokenizer has."""
    known = ("vocab_size", "num_vocab")
    return {k: with_vocabulary(v) if k == "text_config" else tiny.VOCABULARY if k in known else v
            for k, v in config.items()}  # fmt: skip


def both(path: Path | str):
    """The same model in memory and on disk."""
    return Session.open(path), Session.open(path, LoadOptions(resident="none"))


def store(session: Session) -> LayerStore:
    found = LayerStore.of(session.model)
    assert found is not None
    return found


def held(session: Session) -> int:
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


def same_statistics(first: Session, second: Session) -> None:
    a, b = (one._observations.stats for one in (first, second))
    assert a is not None
    assert b is not None
    assert (a.samples, a.tokens, a.state) == (b.samples, b.tokens, b.state)
    for name, sums in a.sums.items():
        np.testing.assert_array_equal(sums, b.sums[name], err_msg=name)


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes()
            for f in directory.rglob("*") if f.is_file()}  # fmt: skip


def saved(session: Session, path: Path) -> dict[str, bytes]:
    session.save(SaveOptions(path / "m"))
    return files(path / "m")


USUAL = {
    "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v32", "gemma4_text", "hunyuan", "dbrx",
    "bailing_moe_linear", "longcat_flash", "nemotron_h", "granitemoehybrid",
}  # fmt: skip
"""Families of every kind of layer: sliding, sparse, recurrent, of two mixers, sharing state."""


NOT_PACKED = {"granitemoehybrid", "gemma4"}
"""Whose tiny configs cannot be widened for it and opened from disk."""


def slow_unless(usual: bool, *values):
    return pytest.param(*values, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        slow_unless(name in USUAL and bits is None, name, bits)
        for name in RUNNABLE
        for bits in (None, 4)
        if bits is None or name not in NOT_PACKED
    ],
)
def test_collect_preview_and_save_are_those_of_the_resident_model(name, bits, tmp_path) -> None:
    write = packed if bits else checkpoint
    resident, streamed = both(write(name, tmp_path / "model"))
    before = held(streamed)
    for session in (resident, streamed):
        session.collect(COLLECT)
    same_statistics(resident, streamed)
    previews = []
    for session in (resident, streamed):
        session.prune(PruneOptions(n_prune=4 if name != "mixtral" else 2))
        previews.append(session.preview(EVALUATE))
        session.apply(ApplyOptions())
    assert previews[0] == previews[1]
    assert resident.state == streamed.state
    assert saved(resident, tmp_path / "a") == saved(streamed, tmp_path / "b")
    assert held(streamed) - before < store(streamed).largest


PROMPTS = (
    DatasetOptions("demo:harmful", max_samples=12, max_tokens=48),
    DatasetOptions("demo:harmless", max_samples=12, max_tokens=48),
)
EDITS = {
    "merge": MergeOptions(DATA, n_prune=4),
    "merge, refitted": MergeOptions(DATA, n_prune=4, refit_experts=True, auto=True),
    "prune, refitted": PruneOptions(n_prune=4, metric="output_error", refit_experts=True),
    "prune, sequential": PruneOptions(n_prune=4, sequential=True),
    "narrow": NarrowOptions(width=32),
    "abliterate": AblateOptions(*PROMPTS, answer_tokens=2, strength="2"),
}
STAGE = {MergeOptions: "merge", PruneOptions: "prune", NarrowOptions: "narrow",
         AblateOptions: "abliterate"}  # fmt: skip


def edited(session: Session, edit: str, path: Path) -> tuple:
    """(what was planned, the saved files, the state) of an edit."""
    session.collect(COLLECT)
    planned = getattr(session, STAGE[type(EDITS[edit])])(EDITS[edit])
    session.apply(ApplyOptions())
    return planned.kept, planned.warnings, saved(session, path), session.state


# gemma4 and hunyuan hand more than hidden states from layer to layer; dbrx has a list of experts.
@pytest.mark.parametrize(
    ("name", "bits", "edit"),
    [("qwen3_moe", None, edit) for edit in EDITS]
    + [slow_unless(edit == "merge", "qwen3_moe", 4, edit) for edit in EDITS]
    + [
        ("deepseek_v3", None, "merge, refitted"),
        ("gpt_oss", None, "merge"),
        ("gpt_oss", None, "abliterate"),
        ("gemma4_text", None, "merge"),
        ("gemma4_text", None, "abliterate"),
        ("hunyuan", None, "prune, refitted"),
        ("mixtral", 4, "prune, refitted"),
        ("dbrx", None, "prune, sequential"),
        ("qwen3_next", None, "merge"),
    ],
)
def test_edits_are_saved_as_from_the_resident_model(name, bits, edit, tmp_path) -> None:
    path = tmp_path / "model"
    if name == "qwen3_moe":
        tiny.write(path, tiny.QWEN3, bits=bits, shards=2)
    else:
        checkpoint(name, path, bits)
    resident, streamed = both(path)
    before = held(streamed)
    found = edited(streamed, edit, tmp_path / "b")
    assert held(streamed) - before < store(streamed).largest
    assert edited(resident, edit, tmp_path / "a") == found
    streamed.undo()
    resident.undo()
    assert saved(resident, tmp_path / "c") == saved(streamed, tmp_path / "d")


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "gemma4_text"])
def test_answers_are_those_of_the_resident_model(name, tmp_path) -> None:
    resident, streamed = both(checkpoint(name, tmp_path / "model"))
    options = RefusalOptions(*PROMPTS, tokens=3)
    counts = []
    for session in (resident, streamed):
        session.collect(COLLECT)
        session.prune(PruneOptions(n_prune=4))
        counts.append(session.refusals(options))
        session.chat("What is rain?", GenerateOptions(max_tokens=3))
    assert counts[0] == counts[1]
    talks = [session._conversation._messages for session in (resident, streamed)]
    assert talks[0] == talks[1]
    assert held(streamed) >= 0


def passes(session: Session, work) -> float:
    """How often `work` reads the whole model."""
    before = store(session).reads
    work()
    return (store(session).reads - before) / len(store(session).paths)


def test_a_pass_over_many_batches_reads_the_model_once(tmp_path) -> None:
    """Also the first, which finds out whether layers can be replayed."""
    session = Session.open(
        checkpoint("qwen3_moe", tmp_path / "model"), LoadOptions(resident="none")
    )
    assert passes(session, lambda: session.collect(COLLECT)) == 1
    assert store(session).verdict == ""
    assert passes(session, lambda: session.collect(COLLECT)) == 1
    assert passes(session, lambda: session.evaluate(EVALUATE)) == 1
    several = EvaluateOptions((OTHER, replace(OTHER, seed=1)), samples=0)
    assert passes(session, lambda: session.evaluate(several)) == 1
    scan = ScanOptions(*PROMPTS, tmp_path / "safety_report.json")
    assert passes(session, lambda: session.safety_scan(scan)) == 1
    assert passes(session, lambda: session.merge(MergeOptions(DATA, n_prune=4))) == 1
    session.discard()
    assert passes(session, lambda: session.narrow(NarrowOptions(width=16))) == 1
    session.discard()
    refitted = PruneOptions(n_prune=4, metric="output_error", refit_experts=True)
    assert passes(session, lambda: session.prune(refitted)) == 1
    session.discard()
    assert passes(session, lambda: session.prune(PruneOptions(n_prune=4))) == 0
    assert passes(session, lambda: session.preview(EVALUATE)) == 1  # the base was measured above


@pytest.mark.parametrize("edit", ["prune", "merge"])
def test_candidate_base_and_checkpoint_are_measured_in_one_reading(edit, tmp_path) -> None:
    sets = EvaluateOptions((*EVALUATE.datasets, OTHER), samples=0)
    found = []
    for session in both(checkpoint("qwen3_moe", tmp_path / "model")):
        session.collect(COLLECT)
        session.prune(PruneOptions(n_prune=2))
        session.apply(ApplyOptions())
        if edit == "prune":
            session.prune(PruneOptions(n_prune=4, allow_stale=True))
        else:
            session.merge(MergeOptions(DATA, n_prune=2))
        if LayerStore.of(session.model) is not None:
            assert passes(session, lambda s=session: found.append(s.preview(sets))) == 1
        else:
            found.append(session.preview(sets))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["gemma4_text", "hunyuan", "dbrx"])
def test_what_cannot_be_replayed_is_noticed_and_read_once_a_batch(name, tmp_path) -> None:
    path = checkpoint(name, tmp_path / "model")
    session = Session.open(path, LoadOptions(resident="none"))
    session.collect(COLLECT)
    assert bool(store(session).verdict) == (name != "dbrx")
    count = passes(session, lambda: session.collect(COLLECT))
    assert count == (1 if name == "dbrx" else 3)  # batches of 2, 2 and 2 samples


def in_a_row(session: Session, path: Path) -> tuple:
    """Prune, merge what is left, ablate, amplify nothing; undo the last, redo it; save."""
    session.collect(COLLECT)
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    session.merge(MergeOptions(DATA, n_prune=2))
    shown = session.preview(EVALUATE)
    session.flip()
    session.flip()
    session.apply(ApplyOptions())
    between = session.state
    session.abliterate(AblateOptions(*PROMPTS, answer_tokens=2, strength="2"))
    session.apply(ApplyOptions())
    session.undo()
    assert session.state == between
    session.redo()
    return shown, session.evaluate(EVALUATE), session.state, saved(session, path)


@pytest.mark.parametrize("bits", [None, slow_unless(False, 4)])
def test_edits_in_a_row_are_saved_as_from_the_resident_model(bits, tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3, bits=bits, shards=3)
    resident, streamed = both(path)
    before = held(streamed)
    found = in_a_row(streamed, tmp_path / "b")
    streamed._workspace.evaluator._references.clear()
    assert held(streamed) - before < store(streamed).largest
    assert in_a_row(resident, tmp_path / "a") == found


def test_scratch_is_gone_with_the_session_and_that_of_dead_processes_at_the_next(tmp_path) -> None:
    path, place = tiny.write(tmp_path / "model", tiny.QWEN3), tmp_path / "scratch"
    one = "import os; print(os.getpid())"
    pid = subprocess.run([sys.executable, "-c", one], capture_output=True, text=True, check=True)
    dead = place / f".layers.saving-{writer().partition('-')[0]}-{pid.stdout.strip()}-00000000"
    dead.mkdir(parents=True)
    (dead / "00000.safetensors").write_bytes(bytes(8))
    session = Session.open(path, LoadOptions(resident="none", scratch=place))
    session.merge(MergeOptions(DATA, n_prune=2))
    assert not dead.exists()
    assert len(list(place.rglob("*.safetensors"))) == 2
    session.discard()
    session.close()
    gc.collect()
    assert list(place.iterdir()) == []


class CancelAfter(Context):
    """Cancels once a pass has passed so many checks."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("cancelled")


@pytest.mark.parametrize("checks", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("edit", ["merge", "prune, refitted", "abliterate"])
def test_a_cancel_at_any_point_leaves_the_model_as_it_was(edit, checks, tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    session = Session.open(path, LoadOptions(resident="none"))
    session.collect(COLLECT)
    before, state = held(session), session.state
    with pytest.raises(Cancelled):
        getattr(session, STAGE[type(EDITS[edit])])(EDITS[edit], CancelAfter(checks))
    assert (session.state, session.editor.live_state, session.editor.staged) == (state, state, None)
    assert held(session) - before < store(session).largest
    assert not any(store(session).in_use(n) for n in range(len(store(session).paths)))
    fresh = Session.open(path)
    fresh.collect(COLLECT)
    assert session.evaluate(EVALUATE) == fresh.evaluate(EVALUATE)


KILLED = """
import os, signal, sys
from pathlib import Path
from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.hooks import progress

class Kill(Context):
    def progress(self, label, done, total=None, unit=""):
        if (label, done) == ("calibrating", 3):
            os.kill(os.getpid(), signal.SIGKILL)

progress.LEAST_SECONDS, progress.SHARE = 0.0, 1e9
session = Session.open(sys.argv[1], LoadOptions(resident="none", scratch=Path(sys.argv[2])))
data = DatasetOptions("demo:mixed", max_samples=6, max_tokens=24)
session.collect(CollectOptions(data, batch_tokens=48, max_batch=2), Kill())
"""


def test_a_pass_that_was_killed_goes_on_at_its_layer(tmp_path) -> None:
    deep = tiny.QWEN3 | {"num_hidden_layers": 5}
    path, place = tiny.write(tmp_path / "model", deep), tmp_path / "scratch"
    words = [sys.executable, "-c", KILLED, str(path), str(place)]
    assert subprocess.run(words, check=False, timeout=120).returncode == -signal.SIGKILL
    resident = Session.open(path)
    resident.collect(COLLECT)
    streamed = Session.open(path, LoadOptions(resident="none", scratch=place))
    store(streamed).verdict, store(streamed).tested = "", 24
    # Three of five layers were passed when the process died.
    assert passes(streamed, lambda: streamed.collect(COLLECT)) == 2 / 5
    same_statistics(resident, streamed)
    assert not list((place / "passes").iterdir())
    assert passes(streamed, lambda: streamed.collect(COLLECT)) == 1


def test_files_that_change_between_passes_are_noticed(tmp_path) -> None:
    path = tiny.write(tmp_path / "model", tiny.QWEN3)
    session = Session.open(path, LoadOptions(resident="none"))
    session.collect(COLLECT)
    tiny.write(tmp_path / "other", tiny.QWEN3 | {"norm_topk_prob": False})
    file = path / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    with pytest.raises(ModelError, match="since the model was loaded"):
        session.collect(COLLECT)
