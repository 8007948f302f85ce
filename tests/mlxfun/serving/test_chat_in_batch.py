"""The chat of the shell is one more client of the batch: it says what it says alone, with the routing
of each token, under every steering, and nobody else's answer changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from desk_rigs import PROMPTS, Desk, plain, tokens_of
from serving_rigs import Served, events, serving, streamed

from mlxfun import Session
from mlxfun.context import Context
from mlxfun.errors import Cancelled, ModelError
from mlxfun.events import Event, Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.serving import lanes
from mlxfun.serving.ask import Ended
from mlxfun.serving.chatting import ChatInBatch
from mlxfun.steering.options import SteerOptions

QUESTION = "What is a good breakfast?"
LONG = GenerateOptions(max_tokens=12)
DRAWN = GenerateOptions(max_tokens=12, temperature=0.9, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def demo() -> Iterator[Session]:
    found = Session.open("demo")
    yield found
    found.close()


class Heard(Context):
    """Keeps the tokens, and does something once there are so many."""

    def __init__(self, at: int = -1, then: Callable[[], None] = lambda: None) -> None:
        self.tokens: list[Token] = []
        self._at, self._then = at, then

    def emit(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(event)

    def interlude(self) -> None:
        if len(self.tokens) >= self._at >= 0:
            self._at = -1
            self._then()


def chat(session: Session, options: GenerateOptions, heard: Heard, desk: Desk | None) -> Any:
    """A new conversation's answer: alone, or in the batch of a desk."""
    session.reset_chat()
    session._decoder.clear()
    session.chat_through(None if desk is None else ChatInBatch(session, desk.scheduler))
    try:
        return session.chat(QUESTION, options, heard)
    finally:
        session.chat_through(None)


@pytest.mark.parametrize("options", [LONG, DRAWN])
def test_among_others_it_says_what_it_says_alone(demo: Session, options: Any) -> None:
    alone, among = Heard(), Heard()
    expected = chat(demo, options, alone, None)
    desk = Desk(demo, cache_bytes=0, concurrency=2)
    others = [desk.ask(plain(prompt, 30)) for prompt in PROMPTS[:4]]  # two of them wait
    for _ in range(4):
        desk.scheduler.step()
    shared = []
    lane = desk.scheduler._lanes[("base", None)]
    found = chat(demo, options, Heard(3, lambda: shared.append(len(lane))), desk)
    assert shared == [3]
    assert found.text == expected.text
    desk.run()
    fresh = Desk(demo, cache_bytes=0)
    again = [fresh.ask(plain(prompt, 30)) for prompt in PROMPTS[:4]]
    fresh.run()
    assert [tokens_of(desk, n) for n in others] == [tokens_of(fresh, n) for n in again]
    found = chat(demo, options, among, desk)
    assert [t.text for t in among.tokens] == [t.text for t in alone.tokens]
    assert [t.token_id for t in among.tokens] == [t.token_id for t in alone.tokens]
    pairs = zip(among.tokens[:-1], alone.tokens[:-1], strict=True)  # no forward consumed the last
    assert all(np.array_equal(a.experts, b.experts) for a, b in pairs)
    assert found.finish_reason == expected.finish_reason
    assert found.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize("options", [LONG, DRAWN])
@pytest.mark.parametrize("at", [1, 5, 11])
def test_steering_in_the_middle_acts_on_the_next_token(
    demo: Session, at: int, options: GenerateOptions
) -> None:
    layer = demo.anatomy.indices[0]

    def steer() -> None:
        demo.steer(SteerOptions(deactivate={layer: tuple(range(8))}))

    alone, among = Heard(at, steer), Heard()
    expected = chat(demo, options, alone, None)
    demo.steer(SteerOptions(clear=True))
    plainly = chat(demo, options, Heard(), None)
    assert (plainly.text != expected.text) == (at < 11)  # the last token was drawn before
    desk = Desk(demo, cache_bytes=0)
    other = desk.ask(plain(PROMPTS[0], 12))

    def steer_as_the_worker_does() -> None:
        desk.scheduler.settle(Context())
        assert isinstance(desk.last(other), Ended)  # it was drained, and the chat was not
        assert len(among.tokens) == at
        steer()
        desk.scheduler.refresh()

    among = Heard(at, steer_as_the_worker_does)
    try:
        found = chat(demo, options, among, desk)
        assert [t.token_id for t in among.tokens] == [t.token_id for t in alone.tokens]
        assert found.text == expected.text
        pairs = zip(among.tokens[:-1], alone.tokens[:-1], strict=True)
        assert all(np.array_equal(a.experts, b.experts) for a, b in pairs)
        # What was made under two steerings is no cache of either.
        assert desk.scheduler.cache_bytes == 0
    finally:
        demo.steer(SteerOptions(clear=True))


def test_two_changes_at_one_token_are_as_good_as_the_last(demo: Session) -> None:
    layer = demo.anatomy.indices[0]

    def steer(*experts: int) -> None:
        demo.steer(SteerOptions(clear=True, deactivate={layer: experts}))

    alone, desk = Heard(5, lambda: steer(*range(8))), Desk(demo, cache_bytes=0)
    expected = chat(demo, LONG, alone, None)
    demo.steer(SteerOptions(clear=True))

    def twice() -> None:
        for experts in (range(8, 14), range(8)):
            desk.scheduler.settle(Context())
            steer(*experts)
            desk.scheduler.refresh()
            desk.scheduler._admit()  # in its lane, of which no step is taken

    try:
        found = chat(demo, LONG, Heard(5, twice), desk)
    finally:
        demo.steer(SteerOptions(clear=True))
    assert found.text == expected.text
    assert found.generated_tokens == expected.generated_tokens


def test_a_cancel_ends_it_at_the_token_reached_and_frees_its_slot(demo: Session) -> None:
    class Stops(Heard):
        def check(self) -> None:
            if len(self.tokens) == 5:
                raise Cancelled("cancelled")

    heard, desk = Stops(), Desk(demo, cache_bytes=0)
    other = desk.ask(plain(PROMPTS[0], 40))
    found = chat(demo, LONG, heard, desk)
    assert (found.finish_reason, found.generated_tokens) == ("cancelled", 5)
    assert desk.scheduler.in_flight == 1
    assert desk.totals.outcomes == {"cancelled": 1}
    desk.run()
    assert desk.last(other).completion_tokens == 40


def test_a_failed_step_is_an_error_of_the_command(demo: Session, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    desk = Desk(demo, cache_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(lanes.BatchLane, "step", broken)
        with pytest.raises(ModelError, match="out of luck"):
            chat(demo, LONG, Heard(), desk)
    assert chat(demo, LONG, Heard(), desk).generated_tokens > 0


def test_its_next_question_is_read_from_the_batchs_cache(demo: Session) -> None:
    desk = Desk(demo)
    demo.chat_through(ChatInBatch(demo, desk.scheduler))
    try:
        demo.reset_chat()
        demo.chat(QUESTION, LONG)
        found = demo.chat("And for dinner?", LONG)
    finally:
        demo.chat_through(None)
    assert found.cached_tokens > 20


def test_it_is_counted_once(demo: Session) -> None:
    demo.set_counting(True)
    try:
        desk = Desk(demo, count="full", cache_bytes=0)
        desk.ask(plain(PROMPTS[0], 4))
        found = chat(demo, LONG, Heard(), desk)
        stats = demo.traffic_stats()
        assert stats.samples == 2
        assert stats.tokens == len(PROMPTS[0]) + 4 + found.prompt_tokens + found.generated_tokens
    finally:
        demo.reset_stats()
        demo.set_counting(False)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo", "collect --dataset demo:mixed --max-samples 8") as found:
        yield found


def test_eight_clients_stream_while_somebody_chats_flips_and_steers(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "What is a mortgage?"}], "max_tokens": 12}
    body |= {"temperature": 0, "logit_bias": {"2": -100}, "stream": True}
    served.run("prune --n-prune 6")
    ask = "chat --new --max-tokens 12 What is a good breakfast?"
    layer = served.engine.view().heat.layers[0]
    steer, clear = f"steer --deactivate {layer}:0..7", "steer --clear"

    def talk() -> list[str]:
        """Both sides, and steered: what a person at the screen hears."""
        texts = [served.run(ask.replace("--new", "--new --current")).text, served.run(ask).text]
        served.run("flip")
        texts += [served.run(ask).text]
        served.run(steer)
        texts += [served.run(ask).text]
        served.run(clear)
        served.run("flip")
        found = served.run("ab --max-tokens 8 What is a good breakfast?")
        return [*texts, found.base.text, found.candidate.text]

    alone = talk()
    assert len(set(alone)) >= 4
    stop = threading.Event()

    def client(_number: int) -> set[str]:
        found = set()
        while not stop.is_set():
            status, text, _ = served.post("/v1/chat/completions", {"model": "base"} | body)
            assert status == 200
            found.add(streamed(events(text)))
        return found

    try:
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, n) for n in range(8)]
            try:
                assert talk() == alone
            finally:
                stop.set()
            said = set().union(*(one.result(timeout=60) for one in clients))
        assert len(said) <= 2  # with the steering, and without
    finally:
        served.run("discard")
