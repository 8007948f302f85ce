"""From tokens to text, thinking and tool calls: whatever the pieces are that the text comes in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
from mlx_lm.tool_parsers import json_tools

from mlxfun.serving.ask import Ask
from mlxfun.serving.http.flow import Assembly, Delta, Turn
from mlxfun.serving.http.tools import salvaged
from mlxfun.serving.text import AnswerText, StopTexts


class Letters:
    """A tokenizer whose tokens are code points, with the markers of Qwen's models."""

    has_thinking, think_start, think_end = True, "<think>", "</think>"
    has_tool_calling, tool_call_start, tool_call_end = True, "<tool_call>", "</tool_call>"
    structural_markers: Sequence[str] = ()
    response_transitions: ClassVar[dict[str, Any]] = {}
    tool_parser = staticmethod(json_tools.parse_tool_call)

    class Detokenizer:
        def __init__(self) -> None:
            self.last_segment = ""

        def reset(self) -> None:
            self.last_segment = ""

        def add_token(self, token: int) -> None:
            self.last_segment = chr(token)

        def finalize(self) -> None:
            self.last_segment = ""

    @property
    def detokenizer(self) -> Any:
        return self.Detokenizer()


def assembled(text: str, end: bool = True, **more: Any) -> Delta:
    ask = Ask((1,), 100, **{"tools": True} | more)
    answer, delta = AnswerText(ask, Letters()), Delta()  # type: ignore[arg-type]
    assembly = Assembly(Turn(ask, Letters()))  # type: ignore[arg-type]
    for char in text:
        assembly.add(answer.add(ord(char)), delta)
        if answer.stopped:
            break
    assembly.add(answer.end(), delta)
    assembly.end(delta)
    return delta


def pieces(text: str, size: int) -> Iterator[str]:
    for at in range(0, len(text), size):
        yield text[at : at + size]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("stop", ["aab", "ab", "b", "xaaz", "aaaaab"])
def test_a_stop_is_found_however_the_text_is_cut(size: int, stop: str) -> None:
    text = "xaaaaabcaab"
    stops, said = StopTexts((stop,)), ""
    for piece in pieces(text, size):
        said += stops.feed(piece)
        assert (text.partition(stop)[0]).startswith(said)
    said += stops.rest()
    assert said == text.partition(stop)[0]
    assert stops.met == (stop if stop in text else None)


def test_the_first_of_several_stops_counts() -> None:
    stops = StopTexts(("world", "wo", "lo w"))
    assert stops.feed("hello world") == "hel"


def test_every_prefix_of_a_stop_at_the_end_is_text() -> None:
    for length, cut in itertools.product(range(1, 6), range(1, 4)):
        stops = StopTexts(("stopped",))
        text = "so " + "stopped"[:length]
        said = "".join(stops.feed(piece) for piece in pieces(text, cut)) + stops.rest()
        assert said == text


def test_thinking_is_told_from_text() -> None:
    found = assembled("<think>hm, a < b</think>It is 4.")
    assert found.joined("reasoning") == "hm, a < b"
    assert found.joined("text") == "It is 4."


def test_thinking_that_the_prompt_has_opened_is_thinking() -> None:
    found = assembled("hm</think>It is 4.", thinking=True)
    assert (found.joined("reasoning"), found.joined("text")) == ("hm", "It is 4.")


def test_a_stop_in_thinking_ends_nothing() -> None:
    found = assembled("<think>a\n\nb</think>c\n\nd", stop=("\n\n",))
    assert (found.joined("reasoning"), found.joined("text")) == ("a\n\nb", "c")


def test_calls_are_whole_and_in_order() -> None:
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
    two = '<tool_call>{"name": "say", "arguments": {}}</tool_call>'
    found = assembled(f"Let me see.{one}{two}")
    assert found.joined("text") == "Let me see."
    assert [(c.name, c.arguments) for c in found.calls] == [
        ("add", '{"a": 1, "b": [2]}'),
        ("say", "{}"),
    ]
    assert len({call.id for call in found.calls}) == 2


def test_without_tools_their_text_is_text() -> None:
    text = '<tool_call>{"name": "say", "arguments": {}}</tool_call>'
    found = assembled(text, tools=False)
    assert found.calls == []
    assert found.joined("text") == text


def test_a_call_that_is_none_is_not_lost() -> None:
    found = assembled("<tool_call>say hello</tool_call> and so on")
    assert found.calls == []
    assert found.joined("text") == "say hello and so on"


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1, "b": [1, 2', '{"a": 1, "b": [1]}'),
        ('{"name": "f", "arguments": {"a": 1, "b": "tw', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "}, ]", "b"', '{"a": "}, ]"}'),
        ('{"name": "f", "arguments": {"a": "\\",", "b": 1', '{"a": "\\","}'),
        ('{"name": "f", "arguments": {"a": {"c": 1}', '{"a": {"c": 1}}'),
        ('{"name": "f", "arguments": {', "{}"),
    ],
)
def test_a_call_that_is_cut_short_is_salvaged(cut: str, arguments: str) -> None:
    found = assembled(f"<tool_call>{cut}")
    (call,) = found.calls
    assert (call.name, call.arguments) == ("f", arguments)


@pytest.mark.parametrize("text", ["", "{", '{"name"', '{"name": "f', "[1, 2", '{"a": 1}', "x"])
def test_what_has_no_name_cannot_be_salvaged(text: str) -> None:
    assert salvaged(text) is None
