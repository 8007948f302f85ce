"""The picture of a server: requests, clients, what went wrong; holding back, refusing, stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from desk_rigs import PROMPTS, Desk, plain, tokens_of
from serving_rigs import QUESTION, Served, serving

from mlxfun import Session
from mlxfun.serving.snapshot import CLIENTS, OTHERS, Ledger, ServingReport

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

LONG = {"messages": QUESTION, "max_tokens": 150, "logit_bias": {"2": -100}}
ME = {"user-agent": "tester/1.0 (linux)"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo", concurrency=2) as found:
        yield found


def picture(served: Served) -> ServingReport:
    found = served.engine.serving()
    assert found is not None
    return found


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_clients_and_errors_are_told(served: Served) -> None:
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(served.post, "/v1/chat/completions", LONG, ME) for _ in range(3)]
        until(lambda: len(picture(served).requests) == 3 and bool(picture(served).lit))
        seen = picture(served)
        assert [one.waiting for one in seen.requests] == [False, False, True]
        first = seen.requests[0]
        assert (first.client, first.side, first.prompt > 5) == ("tester/1.0", "base", True)
        assert set(seen.lit) <= {one.id for one in seen.requests if not one.waiting}
        assert next(iter(seen.lit.values())).shape == (6, 2)
        until(lambda: any(one.rate > 1 for one in picture(served).requests))
        assert served.get("/v1/models/none", ME)[0] == 404
        for one in asked:
            assert one.result(timeout=60)[0] == 200
    until(lambda: not picture(served).requests)
    seen = picture(served)
    (client,) = [c for c in seen.clients if c.name == "tester/1.0"]
    assert (client.requests, client.generated) == (3, 450)
    assert seen.problems[0].status == 404
    assert seen.problems[0].client == "tester/1.0"
    assert "lit" not in seen.data()
    assert served.run("serve").clients == seen.clients


def test_paused_holds_back_draining_refuses_and_stop_goes_on_without(served: Served) -> None:
    assert served.run("serve pause").doing == "paused"
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(served.chat, max_tokens=4)
        until(lambda: [one.waiting for one in picture(served).requests] == [True])
        # The shell's own chat is not held back.
        assert served.run("chat --max-tokens 3 Hello").generated_tokens == 3
        assert not held.done()
        assert served.run("serve resume").doing == "open"
        assert held.result(timeout=60)["usage"]["completion_tokens"] <= 4
    assert served.run("serve drain").doing == "draining"
    assert served.post("/v1/chat/completions", LONG)[0] == 503
    assert served.run("serve resume").doing == "open"
    with serving("load demo") as other:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(other.chat, max_tokens=200, logit_bias={"2": -100})
            until(lambda: picture(other).figures.in_flight == 1)
            other.run("serve stop")
            assert asked.result(timeout=60)["usage"]["completion_tokens"] == 200
        until(lambda: picture(other).doing == "stopped")
        with pytest.raises(OSError, match="refused"):
            other.get("/health")
        assert other.run("chat --max-tokens 3 Hello").generated_tokens == 3
        with pytest.raises(AssertionError, match="start the program anew"):
            other.run("serve resume")


def test_nobody_is_looked_at_unless_somebody_looks() -> None:
    session = Session.open("demo")
    desk = Desk(session, cache_bytes=0)
    number = desk.ask(plain(PROMPTS[0], 8))
    desk.run()
    assert desk.scheduler._watch.seen == {}
    desk.scheduler.lit(True)
    again = desk.ask(plain(PROMPTS[0], 8))
    desk.run()
    assert set(desk.scheduler._watch.seen) == {again}
    assert tokens_of(desk, again) == tokens_of(desk, number)
    session.close()


def test_clients_without_end_are_counted_together() -> None:
    ledger = Ledger()
    for n in range(CLIENTS + 50):
        ledger.add(f"client {n}", requests=1, generated=1)
        ledger.failed(f"client {n}", 500, "no")
    assert len(ledger.clients) == CLIENTS + 1
    assert ledger.clients[0].name == OTHERS
    assert sum(c.requests for c in ledger.clients) == CLIENTS + 50


def test_a_server_that_closes_at_once_is_stopped_and_not_draining(monkeypatch) -> None:
    from commands import serving as module

    class AtOnce:
        def __init__(self, target: Callable[[], None], **_: object) -> None:
            self.start = target

    monkeypatch.setattr(module, "threading", SimpleNamespace(Thread=AtOnce))
    service = SimpleNamespace(doing="open", snapshot=lambda: service.doing)
    running = module.Running(service, SimpleNamespace(close=lambda: None))
    assert running.act("stop") == "stopped"
