"""`generate` and `stream_generate` say what a session says, whatever is held in memory."""

from __future__ import annotations

import pytest

import mlxfun
from mlxfun import Session
from mlxfun.errors import BudgetError
from mlxfun.generation.options import GenerateOptions

QUESTION = "What is a mortgage?"


def test_a_model_by_name_is_opened_partly_and_closed() -> None:
    session = Session.open("demo")
    said = session.chat(QUESTION, GenerateOptions(max_tokens=16)).text
    session.close()
    assert said
    assert mlxfun.generate("demo", QUESTION, max_tokens=16) == said
    assert mlxfun.generate("demo", QUESTION, max_tokens=16, capacity=3) == said
    pieces = list(mlxfun.stream_generate("demo", QUESTION, max_tokens=16, capacity=3))
    assert "".join(pieces) == said
    assert len(pieces) > 4


def test_an_open_session_stays_as_it_is() -> None:
    session = Session.open("demo")
    first = mlxfun.generate(session, QUESTION, max_tokens=8)
    assert mlxfun.generate(session, QUESTION, max_tokens=8) == first
    report = session.chat(QUESTION, GenerateOptions(max_tokens=8))
    assert report.text == first  # the conversation is still empty
    options = GenerateOptions(temperature=0.9, seed=3, max_tokens=8)
    assert mlxfun.generate(session, QUESTION, options) == mlxfun.generate(
        session, QUESTION, options
    )
    session.close()


def test_an_answer_that_is_not_read_to_its_end_closes_the_model() -> None:
    stream = mlxfun.stream_generate("demo", QUESTION, max_tokens=16, capacity=3)
    next(stream)
    stream.close()


def test_a_size_that_is_too_small_is_a_sentence() -> None:
    with pytest.raises(BudgetError, match="at least"):
        mlxfun.generate("demo", QUESTION, resident=1000)
