"""Chatting in a session: routing of each token, caches of each side, steering and cancelling midway."""

from __future__ import annotations

import numpy as np

from mlxfun.events import Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.steering.options import SteerOptions
from tests.mlxfun.session.recording import Recorder


def test_chat_answers_with_routing_for_each_token_and_reuses_its_cache(session):
    ctx = Recorder()
    first = session.chat("What is a kitchen?", GenerateOptions(max_tokens=8), ctx)
    tokens = [e for e in ctx.events if isinstance(e, Token)]
    assert first.generated_tokens == len(tokens)
    assert "".join(t.text for t in tokens).strip() == first.text.strip()
    assert tokens[0].experts.shape == (6, 2)
    assert ((tokens[0].experts >= 0) & (tokens[0].experts < 16)).all()
    np.testing.assert_allclose(tokens[0].weights.sum(axis=1), 1.0, rtol=1e-5)
    second = session.chat("And a garden?", GenerateOptions(max_tokens=4))
    assert second.cached_tokens > first.prompt_tokens


def test_greedy_decoding_equals_stock_generation(session):
    from mlx_lm import stream_generate

    ctx = Recorder()
    session.chat("Name a tool.", GenerateOptions(max_tokens=12), ctx)
    ours = [e.token_id for e in ctx.events if isinstance(e, Token)]
    session.taps.detach()
    prompt = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a tool."}], add_generation_prompt=True
    )
    stock = [
        r.token for r in stream_generate(session.model, session.tokenizer, prompt, max_tokens=12)
    ]
    session.taps.attach()
    eos = session.tokenizer.eos_token_ids
    assert ours == [t for t in stock if t not in eos]


def test_steering_in_the_middle_of_an_answer_acts_on_the_next_token(session):
    """The forward that consumes token i is routed without it, that of token i + 1 with it."""

    class SteerAtTwo(Recorder):
        def interlude(self) -> None:
            if len(self.events) == 2:
                session.steer(SteerOptions(activate={3: (11,)}))

    ctx = SteerAtTwo()
    session.chat("Tell me a story.", GenerateOptions(max_tokens=6), ctx)
    tokens = [e for e in ctx.events if isinstance(e, Token) and e.experts is not None]
    served = [11 in t.experts[3] for t in tokens]
    assert all(served[2:])
    assert not all(served[:2])


def test_cancelling_an_answer_keeps_what_was_said(session):
    report = session.chat(
        "Tell me a story.", GenerateOptions(max_tokens=50), Recorder(stop_after=4)
    )
    assert report.finish_reason == "cancelled"
    assert 0 < report.generated_tokens < 50
