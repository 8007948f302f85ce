"""Chat templates that do not end, or fill the memory, or raise whatever they like."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from mlxfun.data import demo, templates
from mlxfun.data.datasets import Line, prompt_tokens, tokenize
from mlxfun.errors import DatasetError

MESSAGES = [{"role": "user", "content": "What is a mortgage?"}]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(demo.model_path())


def with_template(tokenizer: Any, text: str) -> Any:
    tokenizer.chat_template = text
    tokenizer._tokenizer.chat_template = text
    tokenizer.has_chat_template = True
    return tokenizer


LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set y = n.x + n.x %}{% set n.x = y %}{% endfor %}{{ n.x }}"
)
WRITING = "{% for a in range(100000) %}{{ 'x' * 10000 }}{% endfor %}"


def test_a_template_without_end_is_stopped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(
        DatasetError, match=r"chat: the model's chat template runs for more than 0.2"
    ):
        prompt_tokens(MESSAGES, with_template(tokenizer, LOOP))


@pytest.mark.parametrize("text", [DOUBLING, WRITING])
def test_a_template_that_fills_the_memory_is_stopped(
    tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "CHARACTERS", 1 << 20)
    line = Line("messages", tuple(MESSAGES), "a.jsonl:3")
    with pytest.raises(DatasetError, match=r"a.jsonl:3: .* makes more than 1,048,576 characters"):
        tokenize([line], with_template(tokenizer, text), 64)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no ' * 1000) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages.x.y }}",
        "{{ 'a'.join(3) }}",
        "{{ 'x' * 10 ** 15 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for x in 3 %}{% endfor %}",
        "{% if %}",
    ],
)
def test_whatever_a_template_raises_is_one_sentence(tokenizer: Any, text: str) -> None:
    with pytest.raises(DatasetError, match="chat template refuses this conversation") as caught:
        prompt_tokens(MESSAGES, with_template(tokenizer, text))
    assert len(str(caught.value)) < 300


def test_an_ordinary_template_gives_the_same_and_the_trace_is_put_back(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)

    def mine(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(mine)
    try:
        found = prompt_tokens(MESSAGES, tokenizer)
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)
    assert found.tolist() == list(expected)


def test_the_watch_sees_the_templates_lines(tokenizer: Any) -> None:
    """That Jinja calls a template's code what the watch looks for."""
    watch = templates._Watch("chat")
    before = sys.gettrace()
    sys.settrace(watch.enter)
    try:
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    finally:
        sys.settrace(before)
    assert watch.lines > 5
    assert watch.made > 20
    assert time.monotonic() < watch.deadline
    assert Path(templates._SOURCE).name == "<template>"
