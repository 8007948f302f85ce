"""What a session can do while some experts are on disk is what it does with all of them in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from slot_rigs import cut_short

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.context import Context, as_running
from mlxfun.data import demo
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, ModelError, PlanError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions, RefusalOptions
from mlxfun.events import HELD, ON_DISK, READ, Event, ResidencyFrame, Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.session import residency
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from mlxfun.techniques.router_bias.options import BakeOptions

MIXED = DatasetOptions("demo:mixed", max_samples=6, max_tokens=32)
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=4, max_tokens=32),))
HARMFUL = DatasetOptions("demo:harmful", max_samples=8, max_tokens=24)
HARMLESS = DatasetOptions("demo:harmless", max_samples=8, max_tokens=24)
SHORT = GenerateOptions(max_tokens=12)
PARTLY = LoadOptions(capacity=4)


@pytest.fixture
def pair() -> Iterator[tuple[Session, Session]]:
    """The demo, whole and with 4 of 16 experts a layer in memory."""
    sessions = Session.open("demo"), Session.open("demo", PARTLY)
    yield sessions
    for session in sessions:
        session.close()


def figures(report: Any) -> dict[str, Any]:
    """A report without what differs by nature: times, memory, paths."""
    data = json.loads(json.dumps(report.data()))
    odd = (
        "seconds",
        "milliseconds",
        "report",
        "output",
        "bytes",
        "peak",
        "path",
        "rate",
        "per_second",
        "inputs",
        "gate",
    )
    return {k: v for k, v in data.items() if not any(word in k for word in odd)}


def both(pair: tuple[Session, Session], work: Callable[[Session], Any]) -> tuple[Any, Any]:
    whole, partly = (work(session) for session in pair)
    assert figures(whole) == figures(partly)
    return whole, partly


def test_collecting_chatting_and_evaluating(pair: tuple[Session, Session]) -> None:
    both(pair, lambda s: s.collect(CollectOptions(MIXED)))
    first, second = (s._observations.stats for s in pair)
    assert first is not None
    assert second is not None
    for name, sums in first.sums.items():
        assert np.array_equal(sums, second.sums[name]), name
    both(pair, lambda s: s.chat("What is a mortgage?", SHORT))
    both(pair, lambda s: s.chat("And a pawn?", replace(SHORT, temperature=0.9, seed=3)))
    both(pair, lambda s: s.evaluate(EVAL))
    both(pair, lambda s: s.refusals(RefusalOptions(HARMFUL, HARMLESS, tokens=4)))
    assert pair[1].residency().misses > 0
    assert pair[1].smoke_test(None, 8).passed


def test_scanning_and_steering(pair: tuple[Session, Session], tmp_path: Path) -> None:
    both(
        pair,
        lambda s: s.safety_scan(
            ScanOptions(HARMFUL, HARMLESS, tmp_path / f"{s.residency().capacity}.json")
        ),
    )
    both(pair, lambda s: s.steer(SteerOptions(activate={0: (3,)}, deactivate={2: (1, 2)})))
    both(pair, lambda s: s.chat("What is a mortgage?", SHORT))


def test_a_prune_from_plan_to_saved_model(pair: tuple[Session, Session], tmp_path: Path) -> None:
    for session in pair:
        session.collect(CollectOptions(MIXED))
    both(pair, lambda s: s.prune(PruneOptions(n_prune=4)))
    both(pair, lambda s: s.ab("What is a mortgage?", SHORT))
    both(pair, lambda s: s.preview(EVAL))
    both(pair, lambda s: s.apply(ApplyOptions()))
    partly = pair[1]
    slots = partly._workspace.slots
    assert slots is not None
    for layer, live in zip(slots.layers, partly.editor.committed, strict=True):
        assert set(layer.bank.resident) <= set(live)
    both(pair, lambda s: s.chat("What is a mortgage?", SHORT))
    saved = [
        session.save(SaveOptions(tmp_path / name))
        for session, name in zip(pair, ("whole", "partly"), strict=True)
    ]
    assert saved[0].gate == saved[1].gate
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "partly" / file.name).read_bytes()
    both(pair, lambda s: s.undo())
    for session, name in zip(pair, ("straight", "partly straight"), strict=True):
        session.write_edit(PruneOptions(n_prune=4), SaveOptions(tmp_path / name))
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "partly straight" / file.name).read_bytes()
    both(pair, lambda s: s.chat("What is a mortgage?", SHORT))


def test_edits_of_routers_work_on_slots(pair: tuple[Session, Session]) -> None:
    both(pair, lambda s: s.steer(SteerOptions(levels={0: {3: 2.0}, 2: {1: -2.0}}, rule="additive")))
    both(pair, lambda s: s.bake(BakeOptions(MIXED)))
    both(pair, lambda s: s.preview(EVAL))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("merge", MergeOptions(MIXED, n_prune=4)),
        ("narrow", NarrowOptions(width=32)),
        ("abliterate", AblateOptions(HARMFUL, HARMLESS)),
        ("prune", PruneOptions(n_prune=4, refit_experts=True)),
        ("prune", PruneOptions(n_prune=4, metric="output_error")),
    ],
)
def test_what_makes_tensors_says_what_it_needs(
    name: str, options: Any, pair: tuple[Session, Session], tmp_path: Path
) -> None:
    partly = pair[1]
    before = partly.state
    with pytest.raises(StateError, match=r"--resident none.*--resident all"):
        getattr(partly, name)(options)
    with pytest.raises(StateError, match="partly on disk"):
        partly.write_edit(options, SaveOptions(tmp_path / "out"))
    assert partly.state == before
    assert partly.editor.staged is None


def test_compacting_and_looking_at_all_experts_say_why_not(pair: tuple[Session, Session]) -> None:
    partly = pair[1]
    data = DatasetOptions("demo:eval", max_samples=4, max_tokens=32)
    whole, some = (s.dossier(2, 3, ProbeOptions(data)) for s in pair)
    assert some.top_tokens == whole.top_tokens
    assert some.partner is None
    assert "partly on disk" in some.note
    partly.select(SelectOptions(drop=dict.fromkeys(partly.anatomy.indices, (0, 1, 2, 3))))
    partly.apply(ApplyOptions())
    with pytest.raises(StateError, match="left their slots"):
        partly.compact()


def test_a_profile_holds_what_was_used(pair: tuple[Session, Session], tmp_path: Path) -> None:
    whole, partly = pair
    whole.collect(CollectOptions(MIXED))
    path = tmp_path / "profile.json"
    whole.save_profile(path)
    seeded = Session.open("demo", replace(PARTLY, profile=path))
    stats = whole._observations.stats
    assert stats is not None
    assert seeded._workspace.slots is not None
    used = np.argsort(-stats.score("freq"), axis=1, kind="stable")[:, :4]
    held = seeded._workspace.slots.resident(16)
    for row, most in zip(held, used, strict=True):
        assert set(np.flatnonzero(row)) == set(most.tolist())
    seeded.forget_residency()
    for session in (partly, seeded):
        session.collect(CollectOptions(MIXED))
    assert seeded.residency().misses < partly.residency().misses
    seeded.save_profile(tmp_path / "again.json")
    partly.load_profile(tmp_path / "again.json")
    assert partly._workspace.slots is not None
    again = json.loads((tmp_path / "again.json").read_text())
    for index, row in zip(
        partly.anatomy.indices, partly._workspace.slots.resident(16), strict=True
    ):
        counts = again["layers"][str(index)]["activation_counts"]
        most = sorted(counts, key=counts.__getitem__)[-4:]
        assert sorted(map(int, most)) == np.flatnonzero(row).tolist()
    seeded.close()


def test_the_next_start_holds_what_was_used_last(tmp_path: Path) -> None:
    options = replace(PARTLY, profiles=tmp_path / "profiles")
    first = Session.open("demo", options)
    said = first.chat("What is a mortgage?", SHORT).text
    cold = first.residency().misses
    first.close()
    second = Session.open("demo", options)
    assert second.residency().hits == 0  # what the start read is not counted
    assert second.chat("What is a mortgage?", SHORT).text == said
    assert second.residency().misses < cold
    second.close()
    (file,) = (tmp_path / "profiles").iterdir()
    file.write_text("broken")
    third = Session.open("demo", options)
    assert third.chat("What is a mortgage?", SHORT).text == said
    third.close()


def test_a_whole_model_has_no_slots_to_fill(pair: tuple[Session, Session], tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nothing is known"):
        pair[0].save_profile(tmp_path / "p.json")
    path = tmp_path / "profile.json"
    path.write_text('{"layers": {"0": [1, 2]}}')
    with pytest.raises(StateError, match="--resident auto"):
        pair[0].load_profile(path)
    assert pair[0].residency().whole
    path.write_text('{"layers": {"77": [1, 2]}}')
    with pytest.raises(PlanError, match="another model"):
        pair[1].load_profile(path)


def test_a_model_that_fits_is_loaded_whole_by_auto() -> None:
    session = Session.open("demo", LoadOptions(resident="auto"))
    assert session.residency().whole
    session.close()


def test_what_is_said_of_memory(pair: tuple[Session, Session]) -> None:
    whole, partly = (session.info() for session in pair)
    report = pair[1].residency()
    assert partly.bytes == report.slot_bytes + report.kept_bytes < whole.bytes
    assert partly.checkpoint_bytes == whole.checkpoint_bytes
    assert partly.parameters == whole.parameters
    assert any("4 of 16 experts" in note for note in partly.notes)


def test_a_file_that_is_gone_during_an_answer_costs_only_that_answer(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(demo.model_path(), path)
    (file, *_) = path.glob("model*.safetensors")
    whole, partly = Session.open(path), Session.open(path, PARTLY)
    first = "What is a mortgage?", SHORT
    assert whole.chat(*first).text == partly.chat(*first).text
    with cut_short(file), pytest.raises(ModelError, match="unharmed"):
        partly.chat("How do I tie a knot, and why?", SHORT)
    for question in ("How do I tie a knot, and why?", "And another one?"):
        assert whole.chat(question, SHORT).text == partly.chat(question, SHORT).text
    for session in (whole, partly):
        session.close()


class Stops(Context):
    """Is cancelled at the check of this number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("cancelled")


def test_an_answer_is_cancelled_in_any_layer(pair: tuple[Session, Session]) -> None:
    """And the next one has nothing of it in its cache."""
    whole, partly = pair
    asked = ("What is a mortgage?", "How do I tie a knot?")
    said = [whole.chat(question, SHORT).text for question in asked]
    stopped = 0
    for at in range(1, 60, 7):
        partly.reset_chat()
        ctx = Stops(at)
        with as_running(ctx), suppress(Cancelled):  # raised while the template is filled in
            report = partly.chat(asked[0], SHORT, ctx)
            stopped += report.finish_reason == "cancelled"
        partly.reset_chat()
        assert [partly.chat(question, SHORT).text for question in asked] == said, at
    assert stopped > 3


class Heard(Context):
    """Keeps what is emitted."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_where_experts_are_is_told_while_tokens_pass(
    pair: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "FRAME_SECONDS", 0.0)
    whole, partly = pair
    heard = Heard()
    partly.chat("What is a mortgage?", SHORT, heard)
    frames = [event for event in heard.events if isinstance(event, ResidencyFrame)]
    tokens = [event for event in heard.events if isinstance(event, Token)]
    assert len(frames) == len(tokens)
    for frame in frames:
        assert ((frame.held != ON_DISK).sum(axis=1) <= 4).all()
    assert any((frame.held == READ).any() for frame in frames)
    view = partly.view().heat
    assert view is not None
    assert view.held is not None
    assert ((view.held == HELD).sum(axis=1) == 4).all()
    heard = Heard()
    whole.chat("What is a mortgage?", SHORT, heard)
    assert not any(isinstance(event, ResidencyFrame) for event in heard.events)


def test_closing_gives_the_memory_back() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    session = Session.open("demo", PARTLY)
    session.chat("Hello", SHORT)
    session.close()
    assert mx.get_active_memory() - before < 1 << 20


@pytest.mark.parametrize("resident", ["3MB", "bogus", True, None])
def test_what_is_no_amount_is_refused_and_never_holds_the_whole_model(resident: object) -> None:
    with pytest.raises(UsageError, match="give 'auto', 'all', 'none', or a number of bytes"):
        LoadOptions(resident=resident)  # type: ignore[arg-type]
