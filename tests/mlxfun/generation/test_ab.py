"""The same question to both sides of an edit."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.datasets import prompt_tokens
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import Cancelled, StateError
from mlxfun.events import Token
from mlxfun.generation import ab
from mlxfun.generation.options import GenerateOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from tests.mlxfun import tiny_checkpoints

ASK = "What is a good breakfast?"
SHORT = GenerateOptions(max_tokens=6)


@pytest.fixture(autouse=True)
def turns_of_a_step(monkeypatch) -> None:
    """So that the order of the tokens does not depend on a clock."""
    monkeypatch.setattr(ab, "TURN_SECONDS", 0.0)


class Recorder(Context):
    def __init__(self) -> None:
        self.events = []

    def emit(self, event) -> None:
        self.events.append(event)


def log_probabilities(session, tokens: list[int]) -> np.ndarray:
    """ln p of the next token, one forward from scratch, in float64."""
    logits = np.array(session.model(mx.array([tokens]))[0, -1].astype(mx.float32), np.float64)
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def test_each_side_says_what_it_says_alone(session) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3), 3: (5, 6, 7)}))
    heard = Recorder()
    report = session.ab(ASK, SHORT, heard)
    alone = {}
    for side in ("base", "candidate"):
        session.reset_chat()
        alone[side] = session.chat(ASK, GenerateOptions(max_tokens=6, side=side)).text
    assert {"base": report.base.text, "candidate": report.candidate.text} == alone
    assert report.base.text != report.candidate.text
    sides = [event.side for event in heard.events if isinstance(event, Token)]
    assert sides == ["base", "candidate"] * 6, "a token of each in turn"
    assert session.view().live == "candidate"  # the last to be chosen stays live


def test_the_divergence_is_that_of_reading_the_answer_token_by_token(session) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3), 3: (5, 6, 7)}))
    report = session.ab(ASK, SHORT)
    asked = [{"role": "user", "content": ASK}]
    prompt = [int(t) for t in prompt_tokens(asked, session.tokenizer)]
    expected = []
    for index in range(6):
        read = [*prompt, *report.base.token_ids[:index]]
        ln = {}
        for side in ("base", "candidate"):
            with session.editor.live(side):
                ln[side] = log_probabilities(session, read)
        expected.append(float((np.exp(ln["base"]) * (ln["base"] - ln["candidate"])).sum()))
    assert report.kl == pytest.approx(expected, abs=1e-4)
    pairs = zip(report.base.token_ids, report.candidate.token_ids, strict=True)
    differing = [i for i, (a, b) in enumerate(pairs) if a != b]
    assert report.first_divergence == differing[0]


def test_a_plan_that_is_applied_is_compared_with_the_checkpoint(session) -> None:
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0, 1))))
    staged = session.ab(ASK, SHORT)
    session.apply(ApplyOptions())
    applied = session.ab(ASK, SHORT)
    assert (applied.base.text, applied.candidate.text) == (staged.base.text, staged.candidate.text)
    assert applied.kl == staged.kl
    assert (applied.base.label, applied.candidate.label) == ("checkpoint", "current")
    # The checkpoint's keys and values are not taken for the current state's.
    assert session.chat(ASK, SHORT).text == applied.candidate.text


def test_steering_alone_makes_two_sides(session) -> None:
    with pytest.raises(StateError, match="there is nothing to compare"):
        session.ab(ASK, SHORT)
    session.steer(SteerOptions(deactivate={2: (0, 1, 2, 3, 4, 5, 6, 7)}))
    report = session.ab(ASK, SHORT)
    assert max(report.kl) > 0
    session.steer(SteerOptions(clear=True))
    session.reset_chat()
    assert session.chat(ASK, SHORT).text == report.base.text


def test_the_conversation_goes_on_as_if_nothing_had_been_asked(session) -> None:
    session.chat("Hello", SHORT)
    expected = session.chat(ASK, SHORT).text
    session.reset_chat()
    session.chat("Hello", SHORT)
    session.select(SelectOptions(drop={2: (0, 1, 2, 3)}))
    session.ab("Something else", SHORT)
    assert session.chat(ASK, GenerateOptions(max_tokens=6, side="base")).text == expected


class Impatient(Recorder):
    """Cancels once so many tokens were heard, and stays so, as a job does."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def check(self) -> None:
        if len(self.events) >= self.tokens:
            raise Cancelled("cancelled")


@pytest.mark.parametrize("tokens", range(8))
def test_cancelled_at_any_token_it_leaves_everything_as_it_was(session, tokens: int) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3)}))
    session.steer(SteerOptions(deactivate={4: (7,)}))
    said = [session.chat(ASK, GenerateOptions(max_tokens=6, side=s)).text for s in SIDES]
    session.reset_chat()
    before, state, key = session.view().plan, session.state, session.editor.key()
    heard = Impatient(tokens)
    with pytest.raises(Cancelled):
        session.ab(ASK, GenerateOptions(max_tokens=4), heard)
    assert len(heard.events) == tokens
    assert session.view().plan is before
    assert (session.view().live, session.state, session.editor.key()) == ("candidate", state, key)
    assert not any(tap.clients for tap in session.taps.layers)
    # What the cut answers have left in the caches is what the side itself had put there.
    for side, text in zip(SIDES, said, strict=True):
        session.reset_chat()
        assert session.chat(ASK, GenerateOptions(max_tokens=6, side=side)).text == text


# --- in turn as alone ------------------------------------------------------------------------

SIDES = ("base", "candidate")
MODELS = {
    "qwen3_moe": (tiny_checkpoints.QWEN3, None),
    "qwen3_moe, 4 bit": (tiny_checkpoints.QWEN3, 4),
    "deepseek_v3": (tiny_checkpoints.DEEPSEEK_V3, None),
}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    config, bits = MODELS[request.param]
    path = tiny_checkpoints.write(
        tmp_path_factory.mktemp("ab") / "model", config, dtype=mx.float32, bits=bits
    )
    opened = Session.open(path)
    yield opened
    opened.close()


def spoken(events, side: str) -> list[tuple]:
    """(token, experts, weights) of each token of a side."""
    heard = [e for e in events if isinstance(e, Token) and e.side == side]
    return [
        (
            e.token_id,
            None if e.experts is None else e.experts.tolist(),
            # Some BLAS kernels round by the alignment of what they are given, in the last place.
            None if e.weights is None else np.round(e.weights.astype(np.float64), 5).tolist(),
        )
        for e in heard
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_in_turn_both_sides_say_token_for_token_what_they_say_alone(tiny, temperature) -> None:
    layers = tiny.anatomy.indices
    tiny.select(SelectOptions(clear=True, drop=dict.fromkeys(layers, (0, 4))))
    tiny.steer(SteerOptions(deactivate={layers[-1]: (5,)}, levels={layers[-1]: {2: 0.5}}))
    options = GenerateOptions(max_tokens=12, temperature=temperature, top_p=0.95, seed=7)
    heard = Recorder()
    report = tiny.ab(ASK, options, heard)
    assert spoken(heard.events, "base") != spoken(heard.events, "candidate"), "it matters"
    for side, answer in zip(SIDES, (report.base, report.candidate), strict=True):
        tiny.reset_chat()
        alone = Recorder()
        said = tiny.chat(ASK, replace(options, side=side), alone)
        assert spoken(heard.events, side) == spoken(alone.events, side)
        assert (answer.text, answer.finish_reason) == (said.text, said.finish_reason)
        assert [t for t, *_ in spoken(alone.events, side)] == list(answer.token_ids)


def test_with_one_seed_the_sides_draw_the_same_numbers(session) -> None:
    """Two sides that are one model say the same only if neither draws from the other's numbers."""
    session.steer(SteerOptions(activate={3: (4,)}))
    session.steer(SteerOptions(clear=True, activate={}, levels={3: {4: 1e-12}}))
    report = session.ab(ASK, GenerateOptions(max_tokens=16, temperature=1.5, seed=3))
    assert report.base.token_ids == report.candidate.token_ids
    other = session.ab(ASK, GenerateOptions(max_tokens=16, temperature=1.5, seed=4))
    assert other.base.token_ids != report.base.token_ids


def test_the_side_that_ends_first_leaves_the_turns_to_the_other(session, monkeypatch) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3), 3: (5, 6, 7)}))
    whole = session.ab(ASK, SHORT)
    ids = whole.base.token_ids
    only = next(i for i, token in enumerate(ids) if token not in whole.candidate.token_ids)
    monkeypatch.setattr(
        session.tokenizer, "_eos_token_ids", {*session.tokenizer.eos_token_ids, ids[only]}
    )
    heard = Recorder()
    report = session.ab(ASK, SHORT, heard)
    assert (report.base.finish_reason, report.candidate.finish_reason) == ("stop", "length")
    assert report.base.token_ids == ids[:only]
    assert report.candidate == whole.candidate
    turns = [event.side for event in heard.events]
    assert turns == ["base", "candidate"] * only + ["candidate"] * (6 - only)
    assert len(report.kl) == only


def test_steering_in_the_middle_takes_both_sides_at_their_next_token_and_stays(session) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3)}))

    class SteerAtThree(Recorder):
        seen = ()

        def interlude(self) -> None:
            if len(self.events) == 3 and not self.seen:
                self.seen = (session.view().live,)
                session.steer(SteerOptions(activate={3: (11,)}))

    heard = SteerAtThree()
    session.ab(ASK, SHORT, heard)
    assert heard.seen == ("candidate",), "nobody sees a borrowed side"
    for side, said in zip(SIDES, (2, 1), strict=True):
        served = [11 in experts[3] for _, experts, _ in spoken(heard.events, side)[:-1]]
        assert all(served[said:])
        assert not all(served[:said])
    assert session.editor.steering.activate == {3: (11,)}


def test_steering_in_the_middle_is_not_lost_while_the_checkpoint_answers(session) -> None:
    session.steer(SteerOptions(deactivate={2: (0, 1)}))

    class SteerAtOnce(Recorder):
        def interlude(self) -> None:
            if not session.editor.steering.activate:
                session.steer(SteerOptions(activate={3: (11,)}))
                self.emit("steered")

    heard = SteerAtOnce()
    session.ab(ASK, SHORT, heard)
    assert heard.events.count("steered") == 1, "no turn has taken it back"
    assert session.editor.steering.activate == {3: (11,)}
    assert session.editor.steering.deactivate == {2: (0, 1)}
    assert all(11 in experts[3] for _, experts, _ in spoken(heard.events, "candidate")[:-1])
    assert not all(11 in experts[3] for _, experts, _ in spoken(heard.events, "base")[:-1])


def test_steering_that_comes_and_goes_in_an_answer_leaves_nothing_in_the_cache(session) -> None:
    fresh = session.chat(ASK, GenerateOptions(max_tokens=8)).text
    follow = session.chat("Go on.", GenerateOptions(max_tokens=8))
    session._decoder.clear()
    session.reset_chat()

    class Fickle(Recorder):
        def interlude(self) -> None:
            # Off again before the text of the answer tells: only the cache would know.
            some = {4: {1: 1e-6}} if len(self.events) < 3 else {}
            session.steer(SteerOptions(clear=True, levels=some))

    assert session.chat(ASK, GenerateOptions(max_tokens=8), Fickle()).text == fresh
    assert session.editor.steering.empty
    again = session.chat("Go on.", GenerateOptions(max_tokens=8))
    assert again.text == follow.text
    assert again.cached_tokens == 0


def test_where_the_checkpoint_is_read_from_its_files_one_answer_follows_the_other(session) -> None:
    """Going there for each token would read the edited tensors from the disk each time."""
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=2, max_tokens=32)))
    session.prune(PruneOptions(n_prune=4))
    session.apply(ApplyOptions())
    reads = []
    opened = session.editor.resident._checkpoint
    session.editor.resident._checkpoint = lambda: reads.append(1) or opened()
    try:
        pruned = Recorder()
        session.ab(ASK, SHORT, pruned)
        assert [e.side for e in pruned.events] == list(SIDES) * 6
        assert reads == [], "a prune keeps its routers at hand"
        session.compact()
        reads.clear()
        heard = Recorder()
        report = session.ab(ASK, SHORT, heard)
        assert [e.side for e in heard.events] == ["base"] * 6 + ["candidate"] * 6
        assert len(reads) == 2, "for the answer and for reading it again"
    finally:
        session.editor.resident._checkpoint = opened
    before, after = ([t for t, *_ in spoken(x.events, "candidate")] for x in (pruned, heard))
    assert after == before
    assert report.base.label == "checkpoint"


def test_a_turn_lasts_so_long_that_changing_sides_costs_little(session, monkeypatch) -> None:
    session.select(SelectOptions(drop={2: (0, 1, 2, 3)}))
    monkeypatch.setattr(ab, "TURN_SECONDS", 60.0)
    heard = Recorder()
    session.ab(ASK, SHORT, heard)
    assert [e.side for e in heard.events] == ["base"] * 6 + ["candidate"] * 6


def test_many_applied_edits_make_the_turns_longer(session) -> None:
    for expert in range(4):
        session.select(SelectOptions(drop=dict.fromkeys(range(6), (expert,))))
        session.apply(ApplyOptions())
    heard = Recorder()
    session.ab(ASK, SHORT, heard)
    # Two steps a turn, and the first step of each side reads the prompt.
    assert [e.side for e in heard.events][:6] == [
        "base", "candidate", "base", "base", "candidate", "candidate",
    ]  # fmt: skip
    assert len(heard.events) == 12


# --- taking questions back -------------------------------------------------------------------


def test_asked_again_after_taking_it_back_the_answer_is_the_same(session) -> None:
    session.chat("Hello", SHORT)
    first = session.chat(ASK, SHORT)
    assert session.take_back(1) == ASK
    again = session.chat(ASK, SHORT)
    assert (again.text, again.prompt_tokens) == (first.text, first.prompt_tokens)


def test_what_was_taken_back_for_nothing_comes_back(session) -> None:
    session.chat("Hello", SHORT)
    tokens = session.chat(ASK, SHORT).prompt_tokens
    session.take_back(2)
    session.give_back()
    session.take_back(1)
    assert session.chat(ASK, SHORT).prompt_tokens == tokens


def test_no_more_is_taken_back_than_was_asked(session) -> None:
    session.chat("Hello", SHORT)
    with pytest.raises(StateError, match="the conversation has 1 question to take back, not 2"):
        session.take_back(2)
    assert session.take_back(1) == "Hello"


def test_an_empty_system_prompt_drops_the_one_before(session) -> None:
    plain = session.chat("Hello", SHORT).prompt_tokens
    session.reset_chat()
    session.chat("Hello", GenerateOptions(max_tokens=2, system="Be brief."))
    session.take_back(1)
    assert session.chat("Hello", SHORT).prompt_tokens > plain
    session.take_back(1)
    assert session.chat("Hello", GenerateOptions(max_tokens=2, system="")).prompt_tokens == plain
