"""Passes on workers equal those of one process, bit for bit; a worker that fails harms nobody."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic

import pytest
from rigs import StopAt

from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.distributed import pool as module
from mlxfun.distributed import start as starting
from mlxfun.distributed.pool import Pool
from mlxfun.distributed.start import start, stop, workers_of
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import BudgetError, Cancelled, WorkerError
from mlxfun.evaluation.options import EvaluateOptions, RefusalOptions
from mlxfun.events import Event, RoutingFrame
from mlxfun.hooks.elsewhere import elsewhere_of
from mlxfun.scans.options import ScanOptions
from mlxfun.session.session import Session
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions

DATA = DatasetOptions("demo:mixed", max_samples=7, max_tokens=48)
COLLECT = CollectOptions(DATA, max_batch=1)


class StopAfter(Context):
    """Cancels after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.until = monotonic() + seconds

    def check(self) -> None:
        if monotonic() > self.until:
            raise Cancelled


class Frames(Context):
    """Keeps the samples of each live frame."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, RoutingFrame):
            self.samples.append(event.samples)


@pytest.fixture(scope="module")
def alone() -> Iterator[Session]:
    with closing(Session.open("demo")) as session:
        yield session


@pytest.fixture(scope="module")
def joined() -> Iterator[Session]:
    with closing(Session.open("demo")) as session:
        start(session, 2)
        yield session


@pytest.fixture
def pool(joined: Session) -> Pool:
    """The workers of `joined`, started anew where a test has killed them."""
    rows = workers_of(joined).workers
    if not rows:
        start(joined, 2)
    found = elsewhere_of(joined.model)
    assert isinstance(found, Pool)
    return found


def saved(session: Session, path: Path, options: CollectOptions = COLLECT) -> bytes:
    session.collect(options)
    session.save_stats(path)
    return path.read_bytes()


def test_a_collect_gives_the_same_file_and_live_frames(
    alone: Session, joined: Session, pool: Pool, tmp_path: Path
) -> None:
    before = sum(row.batches for row in workers_of(joined).workers)
    frames = Frames()
    joined.collect(COLLECT, ctx=frames)
    rows = workers_of(joined).workers
    assert sum(row.batches for row in rows) - before == 7
    assert all(row.batches for row in rows)
    assert frames.samples == sorted(frames.samples)
    assert frames.samples[-1] == 7
    joined.save_stats(tmp_path / "b.npz")
    assert saved(alone, tmp_path / "a.npz") == (tmp_path / "b.npz").read_bytes()
    assert pool.size == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("samples", [2, 7])
def test_any_number_of_workers_and_fewer_samples_than_workers(
    alone: Session, tmp_path: Path, count: int, samples: int
) -> None:
    data = DatasetOptions("demo:mixed", max_samples=samples, max_tokens=48)
    options = CollectOptions(data, max_batch=1)
    with closing(Session.open("demo")) as session:
        start(session, count)
        assert saved(session, tmp_path / "b.npz", options) == saved(
            alone, tmp_path / "a.npz", options
        )


def test_fewer_samples_than_workers(
    alone: Session, joined: Session, pool: Pool, tmp_path: Path
) -> None:
    options = CollectOptions(DatasetOptions("demo:mixed", max_samples=1, max_tokens=48))
    assert saved(joined, tmp_path / "b.npz", options) == saved(alone, tmp_path / "a.npz", options)
    assert pool.size == 2


def test_scans_give_the_same_report(
    alone: Session, joined: Session, pool: Pool, tmp_path: Path
) -> None:
    python = DatasetOptions("demo:python", max_samples=5, max_tokens=40)

    def scanned(session: Session, name: str) -> str:
        options = ScanOptions(DATA, python, tmp_path / name, domain_name="text")
        session.domain_scan(options)
        return (tmp_path / name).read_text()

    assert scanned(joined, "b.json") == scanned(alone, "a.json").replace("a.json", "b.json")
    assert pool.size == 2


def prune(session: Session) -> None:
    session.prune(PruneOptions(n_prune=4))


def merge(session: Session) -> None:
    session.merge(MergeOptions(DATA, n_prune=4))


@pytest.mark.parametrize("edit", [prune, merge])
def test_edits_reach_the_workers(
    alone: Session,
    joined: Session,
    pool: Pool,
    tmp_path: Path,
    edit: Callable[[Session], None],
) -> None:
    try:
        for session in (alone, joined):
            session.collect(COLLECT)
            edit(session)
            session.apply(ApplyOptions())
        assert saved(joined, tmp_path / "b.npz") == saved(alone, tmp_path / "a.npz")
        assert workers_of(joined).state == joined.state == alone.state
    finally:
        for session in (alone, joined):
            session.undo()
    assert saved(joined, tmp_path / "c.npz") == saved(alone, tmp_path / "d.npz")
    assert workers_of(joined).state == joined.state
    assert pool.size == 2


def test_perplexity_and_kl_are_the_same(alone: Session, joined: Session, pool: Pool) -> None:
    held_out = DatasetOptions("demo:eval", max_samples=5, max_tokens=40)

    def measured(session: Session) -> list[object]:
        session.collect(COLLECT)
        prune(session)
        try:
            found = session.evaluate(EvaluateOptions((held_out,)))
            return [found.data()]
        finally:
            session.discard()

    before = sum(row.batches for row in workers_of(joined).workers)
    assert measured(joined) == measured(alone)
    # Seven batches of calibration, and those of both sides of the plan and of the checkpoint.
    assert sum(row.batches for row in workers_of(joined).workers) >= before + 7 + 2
    assert pool.size == 2


def test_a_cancel_keeps_what_was_collected_and_the_workers(
    alone: Session, joined: Session, pool: Pool, tmp_path: Path
) -> None:
    report = joined.collect(CollectOptions(DATA, max_batch=1), ctx=StopAt(3))
    assert report.cancelled
    assert saved(joined, tmp_path / "b.npz") == saved(alone, tmp_path / "a.npz")
    assert pool.size == 2


def test_a_cancel_that_comes_when_its_job_has_ended_does_not_end_the_next(
    alone: Session, joined: Session, pool: Pool, tmp_path: Path
) -> None:
    joined.collect(COLLECT)
    pool._break_off()
    assert saved(joined, tmp_path / "b.npz") == saved(alone, tmp_path / "a.npz")
    assert pool.size == 2


def test_steering_runs_here(joined: Session, pool: Pool, tmp_path: Path) -> None:
    joined.steer(SteerOptions(levels={0: {3: 2.0}}))
    try:
        before = sum(row.batches for row in workers_of(joined).workers)
        joined.collect(COLLECT)  # without steering, as always
        assert sum(row.batches for row in workers_of(joined).workers) == before + 7
    finally:
        joined.steer(SteerOptions(clear=True))
    assert pool.size == 2


def test_workers_that_would_not_fit_are_refused(
    alone: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "free_bytes", lambda: 1 << 20)
    with pytest.raises(BudgetError, match=r"2 workers on this machine hold .* start fewer"):
        start(alone, 2)


@pytest.mark.slow
def test_another_model_is_refused_by_name(
    alone: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(alone), "checkpoint_id", property(lambda _: "id2:other"))
    with pytest.raises(WorkerError, match=r"worker 0 \(this machine\) holds another checkpoint"):
        start(alone, 1)
    assert workers_of(alone).workers == ()


def test_a_worker_that_does_not_start_is_named_with_its_log(
    alone: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(alone), "source", property(lambda _: Path("/does/not/exist")))
    with pytest.raises(WorkerError, match=r"worker 0 \(this machine\) failed: .*/does/not/exist"):
        start(alone, 1)


def test_refusals_and_answers_are_counted_by_workers(
    alone: Session, joined: Session, pool: Pool
) -> None:
    prompts = [DatasetOptions(f"demo:{kind}", max_samples=20, max_tokens=48)
               for kind in ("harmful", "harmless")]  # fmt: skip
    asked = RefusalOptions(*prompts, tokens=12)
    before = sum(row.batches for row in workers_of(joined).workers)
    # The checkpoint alone, then the candidate of a staged edit beside it.
    for session in (alone, joined):
        session.collect(COLLECT)
    assert joined.refusals(asked) == alone.refusals(asked)
    assert sum(row.batches for row in workers_of(joined).workers) > before
    found = []
    for session in (alone, joined):
        session.prune(PruneOptions(n_prune=4))
        found.append(session.refusals(asked))
        found.append(session.preview(EvaluateOptions((DATA,), answers=5, answer_tokens=8)).answers)
        session.discard()
    assert found[:2] == found[2:]


def test_a_cancel_ends_answers_in_the_middle_of_a_batch(joined: Session, pool: Pool) -> None:
    prompts = [DatasetOptions(f"demo:{kind}", max_samples=16, max_tokens=48)
               for kind in ("harmful", "harmless")]  # fmt: skip
    began = monotonic()
    with pytest.raises(Cancelled):
        joined.refusals(RefusalOptions(*prompts, tokens=20_000), StopAfter(0.5))
    joined.collect(COLLECT)  # waits until all have left the job
    assert monotonic() - began < 30


def test_stopped_workers_are_gone(joined: Session, pool: Pool) -> None:
    pids = pool.pids
    stop(joined)
    assert workers_of(joined).workers == ()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_another_state_in_a_worker_is_noticed(
    joined: Session, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = module.changes
    monkeypatch.setattr(pool, "_live", None)
    monkeypatch.setattr(module, "changes", lambda resident, _: changes(resident, "0"))
    joined.collect(COLLECT)
    joined.prune(PruneOptions(n_prune=4))
    joined.apply(ApplyOptions())
    try:
        # What is sent is that of the checkpoint, as if the edit had been lost on the way.
        monkeypatch.setattr(module, "changes", lambda *_: module.Frame("become", {"layers": []}))
        with pytest.raises(WorkerError, match=r"worker 0 \(this machine\) has state .* is live"):
            joined.collect(COLLECT)
    finally:
        joined.undo()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_worker_that_ends_or_hangs_is_named_and_nothing_is_counted(
    alone: Session,
    joined: Session,
    pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 2)
    joined.collect(COLLECT)
    before = joined.save_stats(tmp_path / "before.npz")
    victim = pool.pids[1]
    os.kill(victim, number)
    with pytest.raises(
        WorkerError, match=r"^worker 1 \(this machine\) .*Nothing of it was counted"
    ):
        joined.collect(COLLECT)
    assert joined.save_stats(tmp_path / "after.npz").tokens == before.tokens
    assert (tmp_path / "after.npz").read_bytes() == (tmp_path / "before.npz").read_bytes()
    # The shell goes on alone.
    assert workers_of(joined).workers == ()
    assert saved(joined, tmp_path / "b.npz") == saved(alone, tmp_path / "a.npz")
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
