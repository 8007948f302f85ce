"""Tools that must be called, one call or several, and several answers to one request: from a model
that would never call any by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving_rigs import QUESTION, Served, caller, events, serving, streamed

from mlxfun.serving.ask import Ask
from mlxfun.serving.text import AnswerText

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

CITY = {"type": "string", "maxLength": 6}
DAYS = {"type": "integer", "minimum": 1, "maximum": 9}
WEATHER = {
    "type": "object",
    "properties": {"city": CITY, "days": DAYS},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "parameters": NOTHING}},
]
ASKED: dict[str, Any] = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 200}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(f"load {caller(tmp_path_factory.mktemp('caller'))}") as found:
        yield found


@pytest.fixture(scope="module")
def gpt(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def good(name: str, arguments: Any) -> bool:
    if name == "clock":
        return bool(arguments == {})
    well = len(arguments["city"]) <= 6 and 1 <= arguments["days"] <= 9
    return name == "weather" and set(arguments) == {"city", "days"} and well


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_required_calls_follow_the_schemas_of_the_tools(gpt: Any, temperature: float) -> None:
    found = gpt.chat.completions.create(
        model="caller", **ASKED, tool_choice="required", temperature=temperature, seed=3
    ).choices[0]
    calls = found.message.tool_calls
    assert found.finish_reason in ("tool_calls", "length")
    assert calls
    assert not found.message.content
    whole = calls if found.finish_reason == "tool_calls" else calls[:-1]
    assert all(good(c.function.name, json.loads(c.function.arguments)) for c in whole)


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_a_named_function_is_called_once_if_calls_may_not_be_parallel(gpt: Any, name: str) -> None:
    wish = {"type": "function", "function": {"name": name}}
    with gpt.chat.completions.create(
        model="caller", **ASKED, tool_choice=wish, parallel_tool_calls=False, stream=True
    ) as chunks:
        seen = list(chunks)
    (call,) = [call for chunk in seen for call in chunk.choices[0].delta.tool_calls or []]
    assert call.function.name == name
    assert good(name, json.loads(call.function.arguments))
    assert seen[-1].choices[0].finish_reason == "tool_calls"


def test_the_other_apis_force_calls_too(served: Served, gpt: Any) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as claude:
        tools = [{"name": "weather", "input_schema": WEATHER}]
        choice = {"type": "any", "disable_parallel_tool_use": True}
        found = claude.messages.create(
            model="claude-x", max_tokens=200, messages=QUESTION, tools=tools, tool_choice=choice
        )
    (block,) = found.content
    assert (block.type, found.stop_reason) == ("tool_use", "tool_use")
    assert good("weather", block.input)
    functions = [{"type": "function", **TOOLS[1]["function"]}]  # type: ignore[dict-item]
    newer = gpt.responses.create(
        model="caller", input=QUESTION, tools=functions, tool_choice="required",
        max_output_tokens=200, parallel_tool_calls=False,
    )  # fmt: skip
    (item,) = newer.output
    assert (item.type, item.name, item.arguments) == ("function_call", "clock", "{}")
    assert newer.parallel_tool_calls is False


def test_what_cannot_be_forced_is_refused(served: Served) -> None:
    for more, said in (
        ({"response_format": {"type": "json_object"}}, "exclude each other"),
        ({"tools": []}, "needs tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}]},
            "cannot be followed",
        ),
    ):
        body = ASKED | {"tool_choice": "required"} | more
        status, found, _ = served.post("/v1/chat/completions", body)
        assert status == 400
        assert said in found["error"]["message"]


def test_the_first_call_ends_an_answer_that_may_have_one(served: Served) -> None:
    tokenizer = served.service.card.tokenizer  # type: ignore[union-attr]
    said = 'Yes.<tool_call>{"name": "clock"}</tool_call><tool_call>{"name": "clock"}</tool_call>'
    tokens = tokenizer.encode(said, add_special_tokens=False)
    for one, calls in ((True, 1), (False, 2)):
        text, pieces = AnswerText(Ask((1,), 9, tools=True, one_call=one), tokenizer), []
        for token in tokens:
            pieces += text.add(token)
            if text.stopped:
                break
        pieces += text.end()
        written = "".join(p.text if p.kind == "tool" else "|" for p in pieces)
        assert written.count("clock") == calls
        assert text.stopped is one
        assert text.met is None


def test_several_answers_to_one_request(served: Served, gpt: Any) -> None:
    body: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 1.0, "seed": 7}
    alone = [
        gpt.chat.completions.create(model="caller", **body | {"seed": 7 + n}).choices[0].message
        for n in range(3)
    ]
    found = gpt.chat.completions.create(model="caller", n=3, **body)
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert [c.message.content for c in found.choices] == [m.content for m in alone]
    assert len({m.content for m in alone}) > 1
    assert found.usage.completion_tokens > 12
    more = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(served.post("/v1/chat/completions", body | more)[1])
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"]["completion_tokens"] == found.usage.completion_tokens
    for n in range(3):
        mine = [c for c in chunks[:-2] if c["choices"][0]["index"] == n]
        assert streamed(mine) == alone[n].content
        assert mine[-1]["choices"][0]["finish_reason"] == found.choices[n].finish_reason
    texts = gpt.completions.create(model="caller", prompt="Once", n=2, max_tokens=4)
    assert [c.index for c in texts.choices] == [0, 1]
    assert served.service.figures().in_flight == 0


def test_several_answers_read_their_prompt_once(served: Served) -> None:
    words = " ".join(f"word{n}" for n in range(30))
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 3, "n": 4}
    before = served.service.figures()
    status, found, _ = served.post("/v1/chat/completions", body)
    assert (status, len(found["choices"])) == (200, 4)
    after = served.service.figures()
    prompt = found["usage"]["prompt_tokens"]
    assert after.prompt_tokens - before.prompt_tokens == 4 * prompt
    read = 4 * prompt - (after.cached_tokens - before.cached_tokens)
    assert prompt <= read <= prompt + 3 * 17  # the end of it is read again by each
