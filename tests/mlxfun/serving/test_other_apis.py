"""Anthropic's client, OpenAI's newer API, and tool calls through all of them, against a live server.

What the model says is put into its mouth: a processor of logits that leaves one token at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from serving_rigs import QUESTION, Served, caller, serving

from mlxfun.serving import sampling

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "What it will be like", "parameters": SCHEMA}
OPENAI_TOOLS = [{"type": "function", "function": FUNCTION}]
ANTHROPIC_TOOLS = [{"name": "weather", "description": "x", "input_schema": SCHEMA}]

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(f"load {caller(tmp_path_factory.mktemp('caller'))}") as found:
        yield found


@pytest.fixture
def say(served: Served, monkeypatch: pytest.MonkeyPatch) -> Say:
    """What the model is made to say next, and then ends."""
    tokenizer = served.service.card.tokenizer

    def script(text: str) -> None:
        tokens = [*tokenizer.encode(text, add_special_tokens=False), 2]

        def processors(_sampling: Any) -> list[Any]:
            at = iter(tokens + [2] * 600)

            def forced(_context: mx.array, logits: mx.array) -> mx.array:
                only = mx.arange(logits.shape[-1]) == next(at)
                return mx.where(only, 0.0, -1e9)[None]

            return [forced]

        monkeypatch.setattr(sampling, "processors", processors)

    return script


@pytest.fixture(scope="module")
def gpt(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(served: Served) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


# -- chat completions --------------------------------------------------------------------------


def test_a_call_is_parsed_and_its_result_is_read(gpt: Any, say: Say) -> None:
    say(f"Let me look.{CALL}")
    found = gpt.chat.completions.create(model="caller", messages=QUESTION, tools=OPENAI_TOOLS)
    choice = found.choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("weather", "tool_calls")
    assert json.loads(call.function.arguments) == {"city": "Bonn", "days": 2}
    assert choice.message.content == "Let me look."
    say("Rain.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    later = gpt.chat.completions.create(
        model="caller", messages=[*QUESTION, choice.message, result], tools=OPENAI_TOOLS
    )
    assert later.choices[0].message.content == "Rain."
    assert later.usage.prompt_tokens_details.cached_tokens >= found.usage.prompt_tokens - 1


def test_a_streamed_call_comes_whole(gpt: Any, say: Say) -> None:
    say(f"Well.{CALL}{CALL}")
    chunks = list(
        gpt.chat.completions.create(
            model="caller", messages=QUESTION, tools=OPENAI_TOOLS, stream=True
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert {call.function.name for call in calls} == {"weather"}
    assert "".join(delta.content or "" for delta in deltas) == "Well."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_no_tool_may_be_called_where_none_is_chosen(gpt: Any, say: Say) -> None:
    say(CALL)
    found = gpt.chat.completions.create(
        model="caller", messages=QUESTION, tools=OPENAI_TOOLS, tool_choice="none"
    )
    assert found.choices[0].message.tool_calls is None
    assert found.choices[0].message.content == CALL


# -- messages ----------------------------------------------------------------------------------


def test_claude_talks(claude: Any, say: Say) -> None:
    say("It is a loan.")
    asked = {"model": "claude-opus-4-1", "max_tokens": 50, "messages": QUESTION, "system": "Hi."}
    found = claude.messages.create(**asked)
    assert found.content[0].text == "It is a loan."
    assert (found.stop_reason, found.model) == ("end_turn", "claude-opus-4-1")
    count = claude.messages.count_tokens(
        model="claude-x", messages=QUESTION, system=[{"type": "text", "text": "Hi."}]
    ).input_tokens
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count
    again = claude.messages.create(**asked).usage
    assert again.cache_read_input_tokens == count - 1
    assert again.input_tokens == 1


def test_claude_streams(claude: Any, say: Say) -> None:
    say(f"Let me look.{CALL}")
    with claude.messages.stream(
        model="claude-x", max_tokens=99, messages=QUESTION, tools=ANTHROPIC_TOOLS
    ) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    text, call = found.content
    assert text.text == "Let me look."
    assert (call.name, call.input) == ("weather", {"city": "Bonn", "days": 2})
    assert found.stop_reason == "tool_use"
    assert found.usage.output_tokens > 10


def test_claudes_results_are_read(claude: Any, say: Say) -> None:
    say("Rain.")
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bonn"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    found = claude.messages.create(
        model="claude-x", max_tokens=9, messages=turns, tools=ANTHROPIC_TOOLS
    )
    assert found.content[0].text == "Rain."


def test_claudes_call_that_is_cut_short_is_salvaged(claude: Any, say: Say) -> None:
    say(CALL[: CALL.index('"days"')])
    found = claude.messages.create(
        model="claude-x", max_tokens=200, messages=QUESTION, tools=ANTHROPIC_TOOLS
    )
    assert found.content[-1].input == {"city": "Bonn"}


def test_claudes_stops_and_limits(claude: Any, say: Say) -> None:
    asked = {"model": "claude-x", "messages": QUESTION}
    say("one two three four")
    found = claude.messages.create(max_tokens=50, stop_sequences=[" three"], **asked)
    assert (found.content[0].text, found.stop_reason) == ("one two", "stop_sequence")
    assert found.stop_sequence == " three"
    assert claude.messages.create(max_tokens=2, **asked).stop_reason == "max_tokens"


def test_claudes_errors(claude: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(
            model="claude-x", max_tokens=5, messages=QUESTION, extra_body={"temperature": "x"}
        )
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        claude.messages.create(model="another", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is missing"):
        claude.post("/v1/messages", body={"messages": QUESTION}, cast_to=object)


# -- responses ---------------------------------------------------------------------------------


def test_a_response(gpt: Any, say: Say) -> None:
    say("It is a loan.")
    found = gpt.responses.create(model="caller", input="What is a mortgage?", instructions="Hi.")
    assert found.output_text == "It is a loan."
    assert found.status == "completed"
    assert found.usage.output_tokens > 2
    cut = gpt.responses.create(model="caller", input=QUESTION, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_is_streamed_with_its_events(gpt: Any, say: Say) -> None:
    say(f"Wait.{CALL}")
    tools = [{"type": "function", **FUNCTION}, {"type": "web_search"}]
    events = list(gpt.responses.create(model="caller", input=QUESTION, tools=tools, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "Wait."
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.type for item in done] == ["message", "function_call"]
    assert json.loads(done[1].arguments) == {"city": "Bonn", "days": 2}
    assert [item.id for item in events[-1].response.output] == [item.id for item in done]


def test_a_response_reads_the_whole_conversation(gpt: Any, say: Say) -> None:
    say("Rain.")
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    tools = [{"type": "function", **FUNCTION}]
    found = gpt.responses.create(model="caller", input=turns, tools=tools)
    assert found.output_text == "Rain."
    with pytest.raises(openai.BadRequestError, match="whole conversation"):
        gpt.responses.create(model="caller", input="x", previous_response_id="resp_1")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("messages", {}),
        ("messages", {"max_tokens": 5, "messages": []}),
        ("messages", {"max_tokens": 0, "messages": QUESTION}),
        ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": 1}]}),
        ("messages", {"max_tokens": 5, "messages": [{"role": "x", "content": "x"}]}),
        ("messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("messages", {"max_tokens": 5, "messages": QUESTION, "tools": [{"name": 1}]}),
        ("messages", {"max_tokens": 5, "messages": QUESTION, "stop_sequences": [1]}),
        ("messages", {"max_tokens": 5, "messages": QUESTION, "thinking": {"type": "x"}}),
        ("messages", {"max_tokens": 5, "messages": QUESTION, "tool_choice": {"type": "tool"}}),
        ("messages/count_tokens", {"messages": []}),
        ("messages/count_tokens", {"messages": "x"}),
        ("responses", {}),
        ("responses", {"input": []}),
        ("responses", {"input": 1}),
        ("responses", {"input": [{"type": "x"}]}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("responses", {"input": [{"type": "function_call"}]}),
        ("responses", {"input": "x", "tools": [{"type": "function"}]}),
        ("responses", {"input": "x", "text": {"format": {"type": "x"}}}),
        ("responses", {"input": "x", "reasoning": {"effort": "x"}}),
        ("responses", {"input": "x", "max_output_tokens": 0}),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(served: Served, path: str, body: Any) -> None:
    status, found, _ = served.post(f"/v1/{path}", body)
    assert 400 <= status < 500
    assert found["error"]["message"]
    assert (found.get("type") == "error") == path.startswith("messages")
