"""OpenAI's own client against a live server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving_rigs import QUESTION, Served, serving

from mlxfun import Session
from mlxfun.data.datasets import prompt_tokens
from mlxfun.generation.options import GenerateOptions

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """The answer of the shell's own decoder, which shares no code with the batches."""
    session = Session.open("demo")
    prompt = [int(t) for t in prompt_tokens(QUESTION, session.tokenizer)]

    def answer(tokens: int) -> Any:
        return session.greedy(prompt, GenerateOptions(max_tokens=tokens))

    yield answer
    session.close()


def test_a_chat_is_answered_as_the_shell_would(client: Any, alone: Any, served: Served) -> None:
    expected = alone(24)
    found = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=24)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 24
    assert found.usage.total_tokens == found.usage.prompt_tokens + 24
    assert found.model == "demo"
    assert found.system_fingerprint == served.engine.view().state


def test_it_ends_where_the_model_ends(client: Any, alone: Any) -> None:
    found = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=100)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.content == alone(100).text


def test_a_stream_says_the_same_in_pieces(client: Any, alone: Any) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == alone(24).text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client: Any, alone: Any) -> None:
    whole = alone(100).text
    stop = whole[20:27]  # it crosses tokens
    for stream in (False, True):
        found = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=100, stop=[stop, "never"], stream=stream
        )
        if stream:
            chunks = list(found)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_a_seed_draws_the_same_answer_again_whoever_else_asks(client: Any) -> None:
    def drawn(seed: int) -> str:
        found = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=30, temperature=1.2, seed=seed, top_p=0.95
        )
        return str(found.choices[0].message.content)

    first = [drawn(seed) for seed in (1, 2, 3)]
    assert len(set(first)) == 3
    assert [drawn(seed) for seed in (3, 1, 2)] == [first[2], first[0], first[1]]


def test_log_probabilities_are_those_of_the_model(client: Any) -> None:
    session = Session.open("demo")
    prompt = prompt_tokens(QUESTION, session.tokenizer)
    found = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=4
    )
    import mlx.core as mx

    logits = np.array(session.model(mx.array(prompt[None]))[0, -1].astype(mx.float32), np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    best = np.argsort(-expected)[:4]
    first = found.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(expected[best[0]], abs=1e-3)
    assert [t.logprob for t in first.top_logprobs] == pytest.approx(expected[best], abs=1e-3)
    assert first.top_logprobs[1].token == session.tokenizer.decode([int(best[1])])
    assert len(found.choices[0].logprobs.content) == 3
    session.close()


def test_a_bias_bars_and_forces_tokens(client: Any, served: Served) -> None:
    tokenizer = served.service.card.tokenizer
    (wanted,) = tokenizer.encode(" the")
    found = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=5, logit_bias={str(wanted): 100}
    )
    assert found.choices[0].message.content.split() == ["the"] * 5


def test_penalties_change_what_repeats(client: Any, served: Served) -> None:
    (wanted,) = served.service.card.tokenizer.encode(" the")
    found = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=12,
        logit_bias={str(wanted): 20},
        frequency_penalty=2,
        extra_body={"repetition_penalty": 3.0},
    )
    assert found.choices[0].message.content.split().count("the") < 12


@pytest.mark.parametrize(
    "more",
    [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}],
)
def test_filters_that_leave_one_token_draw_the_best(client: Any, alone: Any, more: Any) -> None:
    found = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=12, temperature=1.5, extra_body=more
    )
    assert found.choices[0].message.content == alone(12).text


def test_plain_text_is_continued(client: Any) -> None:
    found = client.completions.create(model="demo", prompt="Once upon", max_tokens=8, logprobs=2)
    choice = found.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.top_logprobs[0]) == 2
    parts = client.completions.create(model="demo", prompt="Once upon", max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == choice.text


def test_developer_is_system(client: Any) -> None:
    texts = [
        client.chat.completions.create(
            model="demo",
            messages=[{"role": role, "content": "Answer in verse."}, *QUESTION],
            max_tokens=12,
        )
        for role in ("developer", "system")
    ]
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content
    assert texts[0].usage.prompt_tokens == texts[1].usage.prompt_tokens


def test_contents_may_come_in_parts(client: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a mortgage?"}]
    found = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], max_tokens=8
    )
    whole = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=8)
    assert found.choices[0].message.content == whole.choices[0].message.content


def test_the_experts_of_each_token_are_those_of_the_shell(client: Any, served: Served) -> None:
    session = Session.open("demo")
    prompt = [int(t) for t in prompt_tokens(QUESTION, session.tokenizer)]
    expected: list[Any] = []
    session._decoder.clear()
    session._decoder.run(
        prompt,
        GenerateOptions(max_tokens=6),
        session.editor.key,
        lambda i, token, text, experts, weights: expected.append((token, experts, weights)),
    )
    found = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=6, extra_body={"mlxfun": {"routing": True}}
    )
    routing = found.mlxfun["routing"]
    assert found.mlxfun["layers"] == list(session.anatomy.indices)
    assert [one["token"] for one in routing] == [token for token, _, _ in expected]
    for one, (_, experts, weights) in zip(routing[:-1], expected, strict=False):
        for row, mine in enumerate(one["experts"]):
            theirs = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
            assert set(mine) == set(theirs)
            assert one["weights"][row] == pytest.approx([theirs[e] for e in mine], abs=1e-4)
    session.close()


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_errors_are_those_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="another", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature must be from 0 to 2"):
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=3)
    with pytest.raises(openai.BadRequestError, match="needs a schema"):
        client.chat.completions.create(
            model="demo", messages=QUESTION, response_format={"type": "json_schema"}
        )


def test_metrics_are_prometheus_text(served: Served, client: Any) -> None:
    client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2)
    status, text, headers = served.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert int(values["mlxfun_completion_tokens_total"]) >= 2
    assert int(values['mlxfun_requests_total{outcome="length"}']) >= 1
    assert values["mlxfun_requests_in_flight"] == "0"
