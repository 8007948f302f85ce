"""What a conversation holds: cancelled questions and ones that are too long are no part of it."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.context import Context
from mlxfun.errors import Cancelled, UsageError
from mlxfun.events import Event, Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.model.anatomy.context_length import context_length

SHORT = GenerateOptions(max_tokens=6)


class Stopping(Context):
    """Cancels an answer once it has some tokens."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def emit(self, event: Event) -> None:
        self._left -= isinstance(event, Token)

    def check(self) -> None:
        if self._left <= 0:
            raise Cancelled("cancelled")


def test_a_cancelled_question_is_not_read_again(session: Session) -> None:
    first = session.chat("What is a mortgage?", SHORT)
    alone = session.chat("And a loan?", SHORT)
    session.reset_chat()
    session.chat("What is a mortgage?", SHORT)
    stopped = session.chat("tell " * 200, SHORT, Stopping(2))
    assert (stopped.finish_reason, stopped.generated_tokens) == ("cancelled", 2)
    again = session.chat("And a loan?", SHORT)
    assert again.prompt_tokens == alone.prompt_tokens > first.prompt_tokens
    assert again.text == alone.text


def test_a_question_cancelled_before_its_answer_is_not_read_again(session: Session) -> None:
    stopped = session.chat("tell " * 200, SHORT, Stopping(0))
    assert stopped.finish_reason == "cancelled"
    assert session.count_tokens("And?", SHORT).conversation == 0


def test_a_question_longer_than_the_models_context_is_refused_and_forgotten(
    session: Session,
) -> None:
    session.chat("What is a mortgage?", SHORT)
    counted = session.count_tokens("And a loan?", SHORT)
    with pytest.raises(UsageError, match=r"has 1,\d\d\d tokens, and the model's context is 512"):
        session.chat("word " * 1000, SHORT)
    assert session.count_tokens("And a loan?", SHORT) == counted
    assert session.chat("And a loan?", SHORT).prompt_tokens == counted.prompt


def test_the_tokens_of_a_text_are_counted_before_it_is_sent(session: Session) -> None:
    long = session.count_tokens("word " * 1000, SHORT)
    assert long.context == 512
    assert not long.fits
    assert long.summary().endswith("the model's context holds 512: too long to be asked")
    short = session.count_tokens("What is a mortgage?", SHORT)
    assert short.fits
    assert short.tokens < short.prompt < 40
    with_system = session.count_tokens("What?", GenerateOptions(system="Be brief. " * 9))
    assert with_system.prompt > session.count_tokens("What?", SHORT).prompt + 18


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 262144}}, 262144),
        ({"max_position_embeddings": 0, "n_positions": 2048}, 2048),
        ({"model_type": "mamba"}, None),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({"max_position_embeddings": 163840, "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
    ],
)  # fmt: skip
def test_the_context_is_what_the_config_says(config: dict[str, object], length: int) -> None:
    assert context_length(config) == length
