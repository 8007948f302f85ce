"""Two hundred malformed requests get a 4xx with one sentence each, and hurt nobody."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_rigs import QUESTION, Served, said, serving

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRONG = ["x", True, [], {}, [1], {"a": 1}, "NaN", -1e300, 1e300]

WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": [*WRONG, -0.1, 2.1, "0.5"],
    "top_p": [*WRONG, -0.1, 1.1],
    "min_p": [*WRONG, -0.1, 1.1],
    "top_k": [*WRONG, -2, 1.5, 1 << 40],
    "max_tokens": [*WRONG, 0, -1, 1.5, 1 << 40],
    "seed": ["x", True, [], {}, 0.5, 1 << 70, -(1 << 70)],
    "n": ["x", True, [], 0, 17, 1_000_000],
    "presence_penalty": [*WRONG, 3, -3],
    "frequency_penalty": [*WRONG, 3, -3],
    "repetition_penalty": [*WRONG, 0, -1],
    "repetition_context_size": ["x", 0, -1, 1 << 30],
    "logit_bias": [
        "x", 1, [], [1, 2], {"x": 1}, {"-1": 1}, {"999999999": 1}, {"4096": 1}, {"1": "x"},
        {"1": 101}, {"1": True}, {"1.5": 1}, {"１": 1}, {str(n): 1 for n in range(2000)},
    ],
    "stop": [1, True, {}, [1], ["a", 2], ["a"] * 17, "a" * 1000],
    "stream": ["x", 1, [], {}],
    "stream_options": ["x", 1, [], {"include_usage": "x"}],
    "model": [1, [], {}, "another", "x" * 10_000, "../../model"],
    "messages": [
        "x", 1, {}, [], ["x"], [1], [None], [{}], [{"content": "x"}], [{"role": "nobody"}],
        [{"role": 1, "content": "x"}], [{"role": "user", "content": 1}],
        [{"role": "user", "content": {"a": 1}}], [{"role": "user", "content": [1]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
        [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": "x"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
        [{"role": "user", "content": "word " * 2000}],
    ],
    "tools": [
        "x", 1, {}, [1], [{}], [{"type": "retrieval"}], [{"type": "function"}],
        [{"type": "function", "function": {}}], [{"type": "function", "function": {"name": 1}}],
        [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        [{"type": "function", "function": {"name": "f"}}],  # the demo has no format for calls
    ],
    "tool_choice": ["x", 1, {"type": "function", "function": {"name": "f"}}, "required"],
    "response_format": ["x", 1, {}, {"type": "x"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
                        {"type": "json_schema", "json_schema": {"schema": "x"}}],
    "logprobs": ["x", [], {}, 21, -1],
    "top_logprobs": [5000, -1, "x", 1.5, 3],
    "reasoning_effort": ["x", 1, []],
    "chat_template_kwargs": ["x", 1, {"enable_thinking": "x"}],
    "mlxfun": [
        "x", 1, [], {"x": 1}, {"routing": "x"}, {"steer": 1}, {"steer": {"x": 1}},
        {"steer": {"activate": [1]}}, {"steer": {"activate": {"99": [1]}}},
        {"steer": {"activate": {"0": "x"}}}, {"steer": {"activate": {"0": [99]}}},
        {"steer": {"activate": {"0": [-1]}}}, {"steer": {"activate": {"0": [1]},
                                                         "deactivate": {"0": [1]}}},
    ],
}  # fmt: skip

RAW = [
    b"", b"x", b"[]", b'"x"', b"1", b"null", b"{", b'{"messages": [', b'{"messages": NaN}',
    b'{"temperature": Infinity}', b'{"temperature": 1e999}', b"\xff\xfe", b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1}',
    b"[" * 100_000, b'{"a":' * 10_000, b'{"a":' * 70 + b"1" + b"}" * 70,
    b'{"seed": ' + b"9" * 5000 + b"}", b"{}", b'{"messages": null}',
    "{\"messages\": [{\"role\": \"user\", \"content\": \"é\"}]}".encode("utf-16"),
]  # fmt: skip

PROMPTS: list[Any] = [
    None, 1, True, {}, [], [[]], [1.5], ["a", "b"], [[1], [2]], [-1], [4096], [1, "x"], "",
]  # fmt: skip


def bodies() -> Iterator[tuple[str, bytes]]:
    for name, values in WRONG_VALUES.items():
        for value in values:
            yield CHAT, json.dumps({"messages": QUESTION, "max_tokens": 2} | {name: value}).encode()
    for raw in RAW:
        yield CHAT, raw
    for prompt in PROMPTS:
        yield TEXT, json.dumps({"prompt": prompt, "max_tokens": 2}).encode()
    for name, value in (("echo", True), ("suffix", "x"), ("best_of", 2), ("logprobs", 5000)):
        yield TEXT, json.dumps({"prompt": "x", name: value}).encode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo", body_bytes=1 << 20) as found:
        yield found


def test_there_are_about_two_hundred() -> None:
    assert len(list(bodies())) > 200


def test_each_is_refused_in_one_sentence_while_a_neighbour_is_answered(served: Served) -> None:
    alone = said(served.chat(max_tokens=16, logit_bias={"2": -100}))
    with ThreadPoolExecutor(1) as pool:
        for path, body in bodies():
            neighbour = None
            if not body.startswith(b"{"):
                neighbour = pool.submit(served.chat, max_tokens=16, logit_bias={"2": -100})
            status, found, _ = served.post(path, body)
            assert 400 <= status < 500, (body[:200], found)
            sentence = found["error"]["message"]
            assert 5 < len(sentence) < 400, sentence
            assert "\n" not in sentence
            assert "Traceback" not in sentence
            if neighbour is not None:
                assert said(neighbour.result(timeout=60)) == alone
    figures = served.service.figures()
    assert figures.in_flight == figures.waiting == 0
    assert said(served.chat(max_tokens=16, logit_bias={"2": -100})) == alone


def test_a_body_that_is_too_long_is_not_read(served: Served) -> None:
    status, found, _ = served.post(CHAT, b" " * (2 << 20))
    assert status == 413
    assert "1,048,576 bytes" in found["error"]["message"]
    address = served.server.address
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "9" * 30)
    connection.endheaders()
    assert 400 <= connection.getresponse().status < 500
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/../x", 404)],
)
def test_other_paths_and_methods_are_named(served, method, path, status) -> None:
    found, body, _ = served.post(path, b"", method=method)
    assert found == status
    assert path in body["error"]["message"]
    assert ("use POST" in body["error"]["message"]) == (path == CHAT), "the method that is served"


def test_headers_that_never_end_cost_only_their_connection(served: Served) -> None:
    address = served.server.address
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    connection.putrequest("GET", "/health")
    connection.putheader("X-Long", "x" * 200_000)
    try:
        connection.endheaders()
        assert connection.getresponse().status == 400
    except (ConnectionError, http.client.HTTPException):
        pass  # it was hung up on, which is as good
    connection.close()
    assert served.get("/health")[0] == 200
