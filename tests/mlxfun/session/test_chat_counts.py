"""Counting chat traffic: exact whenever the statistics are read, in whatever batches it is added."""

from __future__ import annotations

import numpy as np
import pytest

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.routing_stats import SUMS
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import ModelError
from mlxfun.events import Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.session import chat_counts
from mlxfun.session.chat_counts import WaitingTokens
from mlxfun.steering.options import SteerOptions

ASK = "What is a good breakfast?"
LONG = GenerateOptions(max_tokens=20)


class Reader(Context):
    """Reads the statistics after each token, as a command in mid-answer would."""

    def __init__(self, session) -> None:
        self.session, self.read, self.experts = session, [], []

    def emit(self, event) -> None:
        if isinstance(event, Token) and event.experts is not None:
            self.experts.append(event.experts)

    def interlude(self) -> None:
        stats = self.session.workspace_stats()
        self.read.append((stats.tokens, stats.sums["freq"].copy()))


@pytest.fixture
def counted(session, monkeypatch):
    """A session that counts, with five tokens to a batch."""
    monkeypatch.setattr(chat_counts, "TOKENS", 5)
    session.workspace_stats = lambda: session._observations.stats
    session.set_counting(True)
    yield session
    session.set_counting(False)
    del session.workspace_stats


def test_the_statistics_hold_each_token_as_soon_as_they_are_read(counted) -> None:
    reader = Reader(counted)
    counted.chat(ASK, LONG, reader)
    prompt = reader.read[0][1].copy()
    for seen in (1, 7, len(reader.experts)):
        expected = prompt.copy()
        for experts in reader.experts[:seen]:
            for layer, chosen in enumerate(experts):
                expected[layer, chosen[chosen >= 0]] += 1
        tokens, freq = reader.read[seen]
        assert tokens == reader.read[0][0] + seen
        np.testing.assert_array_equal(freq, expected)


def test_counts_do_not_depend_on_how_many_tokens_wait(counted, monkeypatch) -> None:
    found = []
    for size in (1, 5, 1000):
        monkeypatch.setattr(chat_counts, "TOKENS", size)
        counted._observations.stats = None
        counted.reset_chat()
        counted._decoder.clear()
        counted.chat(ASK, LONG)
        found.append(counted.workspace_stats())
    for other in found[1:]:
        assert (other.tokens, other.samples) == (found[0].tokens, found[0].samples)
        for name in SUMS:
            np.testing.assert_allclose(other.sums[name], found[0].sums[name], rtol=1e-12)


def test_what_waits_belongs_to_the_statistics_it_was_counted_for(counted) -> None:
    """Only what was counted behind the reset is there afterwards, though three tokens waited."""

    class Reset(Context):
        steps, gone = 0, 0

        def interlude(self) -> None:
            self.steps += 1
            if self.steps == 4:
                self.gone = counted.workspace_stats().tokens  # the next tokens wait anew
            if self.steps == 7:
                counted._observations.reset()

    def fresh(ctx: Context) -> None:
        counted._observations.stats = None
        counted.reset_chat()
        counted._decoder.clear()
        counted.chat(ASK, LONG, ctx)

    fresh(Context())
    whole, reset = counted.workspace_stats().tokens, Reset()
    fresh(reset)
    # Between the two there were three tokens, all of which were waiting.
    assert counted.workspace_stats().tokens == whole - reset.gone - 3


def test_steering_in_the_middle_marks_the_statistics(counted) -> None:
    class Steer(Context):
        def interlude(self) -> None:
            if counted.editor.steering.empty:
                counted.steer(SteerOptions(deactivate={2: (0,)}))

    counted.chat(ASK, LONG, Steer())
    assert counted.workspace_stats().steered


def test_a_broken_token_is_refused_at_once(session) -> None:
    waiting = WaitingTokens(session.anatomy)
    experts = np.zeros((6, 2), dtype=np.int32)
    weights, norms = np.ones((6, 2), np.float32), np.full((6, 2), np.nan, np.float32)
    with pytest.raises(ModelError, match="NaN or infinity"):
        waiting.add(experts, weights, norms, False)


def test_a_collect_forgets_no_counted_token(counted) -> None:
    counted.chat(ASK, LONG)
    before = counted.workspace_stats().tokens
    data = DatasetOptions("demo:mixed", max_samples=2, max_tokens=32)
    report = counted.collect(CollectOptions(data, add=True))
    assert counted.workspace_stats().tokens == before + report.tokens
