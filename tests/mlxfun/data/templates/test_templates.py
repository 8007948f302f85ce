"""Chat templates that do not end, or fill the memory, or raise whatever they like."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx_lm.utils import load_tokenizer

from mlxfun.context import SILENT, Context, as_running
from mlxfun.data import demo
from mlxfun.data.datasets import Line, prompt_tokens, tokenize
from mlxfun.data.templates import bounds as templates
from mlxfun.errors import Cancelled, DatasetError

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
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for x in 3 %}{% endfor %}",
        "{% if %}",
    ],
)
def test_whatever_a_template_raises_is_one_sentence(tokenizer: Any, text: str) -> None:
    with pytest.raises(DatasetError, match="chat template refuses this conversation") as caught:
        prompt_tokens(MESSAGES, with_template(tokenizer, text))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' * 10 ** 15 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{% set a = [0] * 10 ** 9 %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.center(10 ** 10) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x' | indent(10 ** 10, true) }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '%*d' | format(10 ** 10, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10 ** 10) }}",
        "{{ ('{0}' * 10000).format('x' * 10000) }}",
        "{{ ('x' * 10000).replace('x', 'y' * 10000) }}",
        "{{ ('x' * 10000) | replace('x', 'y' * 10000) }}",
        "{{ ('x' * 10000).join([''] * 10000) }}",
        "{{ ([''] * 10000) | join('x' * 10000) }}",
        "{{ ('a' * 10000).translate({97: 'y' * 10000}) }}",
        "{{ ['x' * 100000] * 1000 }}",
        "{{ (['x' * 100000] * 1000) | string }}",
        "{{ (['x' * 100000] * 1000) ~ '' }}",
        "{{ (['x' * 100000] * 1000) | join }}",
        "{{ ('\t' * 1000).expandtabs(10 ** 7) }}",
        "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
        "{% endfor %}{{ n.a }}",
        "{{ ('x' * 10000000) ~ ('x' * 10000000) }}",
        "{{ range(100000) | batch(10 ** 10, 'x') | list }}",
        "{{ '{0[w]:>{0[w]}}'.format({'w': 10 ** 10}) }}",
        "{{ '{w:>{w}}'.format_map({'w': 10 ** 10}) }}",
        "{{ (5).to_bytes(10 ** 10, 'big') }}",
    ],
)
def test_one_huge_operation_is_refused_before_it_runs(tokenizer: Any, text: str) -> None:
    before = templates._memory()
    with pytest.raises(DatasetError, match=r"makes more than 16,777,216 characters"):
        prompt_tokens(MESSAGES, with_template(tokenizer, text))
    assert templates._memory() - before < 200 << 20


# Each holds its predecessor twice: 2**60 of the first, of which Python looks at every one.
LISTS = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
)
TUPLES = (
    "{% set n = namespace(a=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}"
)
ADDED = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = n.a + [n.a] %}"
    "{% set n.b = n.b + [n.b] %}{% endfor %}{{ n.a == n.b }}"
)
MACROS = (
    "{% set n = namespace(a=1, b=1) %}{% macro m() %}{% set n.a = varargs %}{% endmacro %}"
    "{% macro k() %}{% set n.b = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(n.a, n.a) }}{{ k(n.b, n.b) }}{% endfor %}{{ n.a == n.b }}"
)
VIEWS = (
    "{% set n = namespace(a={}, b={}) %}{% for i in range(60) %}"
    "{% set n.a = {1: n.a.items(), 2: n.a.items()} %}"
    "{% set n.b = dict([(1, n.b.items()), (2, n.b.items())]) %}{% endfor %}{{ n.a == n.b }}"
)
# All of these have the hash 0.
COLLIDING = (
    "{% set n = namespace(a=[]) %}{% for i in range(9999) %}"
    "{% set n.a = n.a + [i * 2305843009213693951] %}{% endfor %}{{ dict.fromkeys(n.a) | length }}"
)
LONG = "(('f' * 600000) | int(base=16))"


@pytest.mark.parametrize(
    "text",
    [
        LISTS + "{{ n.a == n.b }}",
        LISTS + "{{ [n.a, n.b] | sort }}",
        LISTS + "{{ n.a in [n.b] }}",
        TUPLES + "{{ {n.a: 1} }}",
        ADDED,
        MACROS,
        VIEWS,
        COLLIDING,
        "{% set a = [['x' * 9999] * 999] * 9999 %}",
        "{{ 1 | round(10 ** 9, 'ceil') }}",
        "{{ 1 | round(-1000000000) }}",
        "{{ " + LONG + " // 3 }}",
        "{{ 3 % " + LONG + " }}",
        "{{ 3 is divisibleby(" + LONG + ") }}",
        "{{ ([[0] * 20000] + [[]] * 20000) | sum(start=[]) }}",
        "{{ ('a' * 100000).translate(['y' * 100000] * 128) }}",
        "{{ ('a' * 8000000).rfind('b' + 'a' * 4000000) }}",
        "{{ ('a' * 8000000).rsplit('b' + 'a' * 4000000) }}",
        "{{ ('a' * 8000000).strip('b' * 8000000 + 'a') }}",
        "{{ ('a' * 8000000) | trim('b' * 8000000 + 'a') }}",
        "{{ ('!' * 1000000) | wordwrap }}",
        "{{ range(9) | batch(999999, ['x' * 999]) | list }}",
        "{{ strftime_now('%c' * 4000000) }}",
    ],
)
def test_one_operation_that_would_take_for_ever_is_refused_before_it_runs(
    tokenizer: Any, text: str
) -> None:
    """Nothing interrupts a call of C, so the seconds here are those that it must not take."""
    began = time.thread_time()
    with pytest.raises(DatasetError, match=r"makes more than 16,777,216 characters"):
        prompt_tokens(MESSAGES, with_template(tokenizer, text))
    assert time.thread_time() - began < 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = n.a + [namespace("
         "x=i ~ 'x' * 9999999)] %}{% endfor %}", "takes more than 64 MiB"),
        ("{{ lipsum(n=10 ** 7) }}", "runs for more than|takes more than"),
        ("{{ range(99999) | slice(10 ** 9) | list }}", "makes more|takes more|runs for"),
    ],
)  # fmt: skip
def test_what_is_made_in_many_steps_is_bounded_too(
    tokenizer: Any, text: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MEMORY", 64 << 20)
    if "runs for" in why:
        monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(DatasetError, match=why):
        prompt_tokens(MESSAGES, with_template(tokenizer, text))


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{{ 'ab' * 3 ~ 1 ~ [2] }}", "ababab1[2]"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ '%03d' % 7 }}{{ 2 ** 10 }}", "a+b0071024"),
        ("{{ '{:>4}|{}'.format('x', 'y') }}{{ 'x' | center(3) }}|", "   x|y x |"),
        ("{{ {'a': [1, 'é']} | tojson }}{{ {'a': 1} | tojson(indent=2) }}", '{"a": [1, "é"]}{\n  "a": 1\n}'),
        ("{{ ('a' * 3000000).split('b') | length }}{{ ('a' * 3000000) | trim | length }}", "13000000"),
        ("{{ 'aXb'.replace('X', '--') }}{{ ' a ' | trim | upper }}{{ [3, 1] | sort | join(',') }}", "a--bA1,3"),
        ("{{ none }}{{ true }}{{ 1.5 }}{{ messages | map(attribute='role') | list }}", "NoneTrue1.5['user']"),
    ],
)  # fmt: skip
def test_what_is_within_the_bounds_is_as_it_was(tokenizer: Any, text: str, made: str) -> None:
    found = prompt_tokens(MESSAGES, with_template(tokenizer, text))
    assert found.tolist() == tokenizer.encode(made, add_special_tokens=False)


@pytest.mark.parametrize(
    "text",
    [
        "{% autoescape true %}{{ '<b>' | safe ~ '<' }}{{ missing ~ 1 }}{% endautoescape %}",
        "{{ '<' ~ 1 ~ none }}{% set x %}a<{% endset %}{{ x ~ '<' }}{{ loop is defined }}",
        "{{ '{}<{}'.format('<', [1]) }}{{ ('<{}>' | safe).format('<') }}{{ '{a}'.format_map({'a': 1}) }}",
        "{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('x') ~ m('y') }}{{ '{}'.format() }}",
        "{{ [1, 2] | join(', ') }}{{ {'a': 1} | items | list }}{{ 7 // 2 }}{{ '%s-%s' % (1, 'x') }}",
        "{{ ['a', 'b'] | map('upper') | join }}{{ [[1], [3]] | sum(start=[]) }}{{ 'abc' | list }}",
        "{{ 'a\nb' | indent(2) }}{{ 'ab' | batch(1) | list }}{{ 'b,a'.split(',') | sort | list }}",
        "{{ 2 ** 100 }}{{ 1.5 ** 2 }}{{ 2 ** -1 }}{{ 'x' * -1 }}{{ 7 % 4 }}{{ [1] + [2] }}",
        "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% set a, b = (1, [2]) %}{{ a, b }}",
        "{{ {'a': [1, (2, 3)], 'b': {}}.items() | list }}{{ [] ~ () ~ {} ~ (1,) }}{{ [1, 2][::-1] }}",
        "{% set n = namespace(a=[]) %}{% for i in range(9) %}{% set n.a = n.a + [i] %}{% endfor %}{{ n.a }}",
        "{{ 12.345 | round(1) }}{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2.5] | sum }}{{ 9 is divisibleby(3) }}",
        "{{ 'a-b-c'.rsplit('-', 1) }}{{ ' x '.strip() }}{{ '--x'.lstrip('-') }}{{ 'axb'.rfind('b') }}",
        "{% macro m(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, b=[3]) }}{{ 7 - 2.5 }}",
        "{{ {'a': 1}.keys() - ['a'] }}{{ dict(a=1) }}{{ 'abc' | wordwrap(2) }}{{ 'a' in {'a': 1} }}",
        "{{ 'a' + 1 }}",
        "{{ 'x'.center('y') }}",
        "{{ ','.join(5) }}",
    ],
)
def test_operations_give_what_they_give_in_the_sandbox_itself(text: str) -> None:
    def made(environment: ImmutableSandboxedEnvironment) -> str:
        try:
            return environment.from_string(text).render()
        except (TypeError, IndexError) as error:
            return repr(error)

    assert made(templates.BoundedEnvironment()) == made(ImmutableSandboxedEnvironment())


def test_a_template_can_be_cancelled_while_it_runs(tokenizer: Any) -> None:
    class Job(Context):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks > 50:
                raise Cancelled("cancelled")

    with as_running(Job()), pytest.raises(Cancelled):
        prompt_tokens(MESSAGES, with_template(tokenizer, LOOP))
    assert sys.gettrace() is None or "Watch" not in str(sys.gettrace())


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
    templates._prepare()
    watch = templates._Watch("chat", SILENT)
    before = sys.gettrace()
    sys.settrace(watch.enter)
    try:
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    finally:
        sys.settrace(before)
    assert watch.lines > 5
    assert watch.written > 20
    assert time.thread_time() < watch.deadline
    assert Path(templates._SOURCE).name == "<template>"
