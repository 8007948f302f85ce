"""The same question to both sides of an edit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.context import Context
from mlxfun.datasets import prompt_tokens
from mlxfun.errors import Cancelled, StateError
from mlxfun.events import Token
from mlxfun.hand_options import SelectOptions
from mlxfun.options import ApplyOptions, GenerateOptions, SteerOptions

ASK = "What is a good breakfast?"
SHORT = GenerateOptions(max_tokens=6)


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
    assert sides == ["base"] * 6 + ["candidate"] * 6
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
        for side in ("current", "staged"):
            with session.editor.live(side):
                ln[side] = log_probabilities(session, read)
        expected.append(float((np.exp(ln["current"]) * (ln["current"] - ln["staged"])).sum()))
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
    assert (applied.base.label, applied.candidate.label) == ("checkpoint", "current state")
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


def test_cancelled_in_the_first_answer_it_says_so_and_changes_nothing(session) -> None:
    class Impatient(Context):
        tokens = 0

        def emit(self, event) -> None:
            self.tokens += 1

        def check(self) -> None:
            if self.tokens >= 2:
                raise Cancelled("cancelled")

    session.select(SelectOptions(drop={2: (0, 1, 2, 3)}))
    before = session.view().plan
    with pytest.raises(Cancelled):
        session.ab(ASK, SHORT, Impatient())
    assert session.view().plan is before
    assert session.view().live == "candidate"


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
