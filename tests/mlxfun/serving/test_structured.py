"""Answers that follow a JSON schema, from a model that would never write JSON by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_rigs import QUESTION, Served, said, serving

from mlxfun.serving import grammar

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo") as found:
        yield found


def is_a_pet(text: str) -> bool:
    found = json.loads(text)
    good = set(found) == {"name", "age", "kind"} and found["kind"] in ("cat", "dog")
    return good and len(found["name"]) <= 8 and 0 <= found["age"] <= 99


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema_beside_others_that_need_not(
    served: Served, temperature: float
) -> None:
    free = said(served.chat(max_tokens=40))
    with ThreadPoolExecutor(4) as pool:
        asked = {"max_tokens": 90, "response_format": FORMAT, "temperature": temperature}
        pets = [pool.submit(served.chat, seed=n, **asked) for n in range(2)]
        others = [pool.submit(served.chat, max_tokens=40) for _ in range(2)]
        for pet in pets:
            found = pet.result(timeout=60)
            assert is_a_pet(said(found)), said(found)
            assert found["choices"][0]["finish_reason"] == "stop"
        assert all(said(other.result(timeout=60)) == free for other in others)


def test_the_client_parses_it(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        found = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=90, response_format=FORMAT
        )
        assert is_a_pet(found.choices[0].message.content)
        text = {"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}}
        newer = client.responses.create(
            model="demo", input=QUESTION, max_output_tokens=90, text=text
        )
        assert is_a_pet(newer.output_text)


def test_an_object_is_one(served: Served) -> None:
    bias = {str(t): 50 for t in served.service.card.tokenizer.encode('"}')}
    found = served.chat(max_tokens=60, response_format={"type": "json_object"}, logit_bias=bias)
    assert said(found).startswith("{")


def test_without_the_library_it_says_what_to_install(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "available", lambda: False)
    body: dict[str, Any] = {"messages": QUESTION, "response_format": FORMAT}
    status, found, _ = served.post("/v1/chat/completions", body)
    assert status == 400
    assert "pip install 'mlxfun[structured]'" in found["error"]["message"]
