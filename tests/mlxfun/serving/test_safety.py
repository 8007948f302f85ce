"""Who may ask, who went away, and what one client's trouble is to the others: nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import pytest
from serving_rigs import QUESTION, Served, said, serving

from mlxfun.errors import UsageError
from mlxfun.serving.options import Address, ServeOptions
from mlxfun.serving.service import Service

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

CHAT = "/v1/chat/completions"
ENDLESS = {"messages": QUESTION, "max_tokens": 480, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("load demo", concurrency=2) as found:
        yield found


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def opened(served: Served, body: dict) -> socket.socket:
    """A connection on which a request was sent and nothing is read yet."""
    address = served.server.address
    raw = json.dumps(body).encode()
    connection = socket.create_connection((address.host, address.port), 20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(served: Served, stream: bool) -> None:
    counted = served.service.figures().by_outcome.get("cancelled", 0)
    connection = opened(served, ENDLESS | {"stream": stream})
    until(lambda: served.service.figures().in_flight == 1)
    connection.close()
    until(lambda: served.service.figures().in_flight == 0)
    assert served.service.figures().by_outcome["cancelled"] == counted + 1


def test_a_client_that_hangs_up_while_it_waits_is_forgotten(served: Served) -> None:
    first = [opened(served, ENDLESS | {"stream": True}) for _ in range(2)]
    until(lambda: served.service.figures().in_flight == 2)
    third = opened(served, ENDLESS)
    until(lambda: served.service.figures().waiting == 1)
    third.close()
    until(lambda: served.service.figures().waiting == 0)
    for connection in first:
        connection.close()
    until(lambda: served.service.figures().in_flight == 0)


def test_a_client_that_hangs_up_in_its_body_is_no_request(served: Served) -> None:
    before = served.service.figures()
    address = served.server.address
    connection = socket.create_connection((address.host, address.port), 20)
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{{".encode()
    )
    time.sleep(0.05)
    connection.close()
    assert said(served.chat(max_tokens=3))
    assert served.service.figures().in_flight == before.in_flight == 0


def test_a_client_that_reads_nothing_keeps_no_slot(served: Served) -> None:
    connection = opened(served, ENDLESS | {"stream": True})
    until(lambda: served.service.figures().by_outcome.get("length", 0) > 0)
    until(lambda: served.service.figures().in_flight == 0)
    connection.close()


def test_a_client_that_takes_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxfun.serving.http import answers
    from mlxfun.serving.http.tickets import Gone

    monkeypatch.setattr(answers, "SEND_SECONDS", 0.01)

    async def stuck(message: object) -> None:
        await asyncio.sleep(60)

    with pytest.raises(Gone):
        asyncio.run(answers.send_body(stuck, b"x"))


def test_a_body_that_does_not_arrive_is_not_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.serving.http import guard

    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    address = served.server.address
    with socket.create_connection((address.host, address.port), 20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n{{".encode()
        )
        assert b"408" in connection.recv(4096).split(b"\r\n")[0]


def test_more_than_can_wait_is_refused() -> None:
    with serving("load demo", concurrency=1, waiting=1) as served:
        held = [opened(served, ENDLESS | {"stream": True}) for _ in range(2)]
        until(lambda: served.service.figures().waiting == 1)
        status, found, _ = served.post(CHAT, ENDLESS)
        assert status == 429
        assert "ask again later" in found["error"]["message"]
        for connection in held:
            connection.close()


def test_pages_and_other_hosts_are_refused(served: Served) -> None:
    body = {"messages": QUESTION, "max_tokens": 2}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        status, found, _ = served.post(CHAT, body, headers)
        assert status == 403
        assert "pages of" in found["error"]["message"]
    status, found, _ = served.post(CHAT, body, {"Host": "evil.example:8080"})
    assert status == 403
    assert "host" in found["error"]["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert served.post(CHAT, body, {"Host": host})[0] == 200


def test_a_page_that_was_named_may_ask() -> None:
    origin = "http://localhost:3000"
    with serving("load demo", origins=(origin,)) as served:
        status, _, headers = served.post(CHAT, b"", {"Origin": origin}, "OPTIONS")
        assert status == 204
        assert headers["access-control-allow-origin"] == origin
        body = {"messages": QUESTION, "max_tokens": 2}
        status, _, headers = served.post(CHAT, body, {"Origin": origin})
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        assert served.post(CHAT, body, {"Origin": "http://localhost:3001"})[0] == 403


def test_a_token_is_demanded_where_there_is_one() -> None:
    with serving("load demo", token="a secret") as served:
        body = {"messages": QUESTION, "max_tokens": 2}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "a secret"},
            {"Authorization": "Bearer a secre"},
            {"Authorization": "Bearer a secret!"},
            {"x-api-key": "\xe9"},
        ):
            status, found, answered = served.post(CHAT, body, headers)
            assert status == 401
            assert "token" in found["error"]["message"]
            assert "a secret" not in found["error"]["message"]
            assert answered["www-authenticate"] == "Bearer"
        assert served.get("/metrics")[0] == served.get("/v1/models")[0] == 401
        assert served.get("/health")[0] == 200
        assert 401 in {problem.status for problem in served.service.snapshot().problems}
        for headers in ({"Authorization": "Bearer a secret"}, {"x-api-key": "a secret"}):
            assert served.post(CHAT, body, headers)[0] == 200


def test_a_public_address_demands_a_token() -> None:
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(UsageError, match="give --token"):
            ServeOptions(Address(host))
        assert ServeOptions(Address(host), token="x").address.host == host
    with pytest.raises(UsageError, match="--token"):
        ServeOptions(commands=True)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("8081", "127.0.0.1", 8081), (":8081", "127.0.0.1", 8081), ("localhost", "localhost", 8080),
        ("[::1]:90", "::1", 90), ("::1", "::1", 8080), ("0.0.0.0:0", "0.0.0.0", 0),
    ],
)  # fmt: skip
def test_addresses(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)


@pytest.mark.parametrize("text", ["x:y", "a:99999", "demo/model:1", "a b:1", "1:٣", ":"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="no address to serve at"):
        Address.parse(text)


def test_an_address_in_use_is_said(served: Served) -> None:
    from mlxfun.serving.http.server import HttpServer

    service = Service(ServeOptions(served.server.address))
    with pytest.raises(UsageError, match="cannot serve at"):
        HttpServer(service)


def test_a_stop_completes_answers_and_accepts_no_more() -> None:
    with (
        serving("load demo") as served,
        opened(served, ENDLESS | {"stream": True, "max_tokens": 90}) as connection,
    ):
        until(lambda: served.service.figures().completion_tokens > 3)
        assert served.server.close(30)
        found = b""
        while part := connection.recv(65536):
            found += part
        assert b"data: [DONE]" in found


def test_a_stop_that_waits_no_longer_breaks_answers_off() -> None:
    with serving("load demo") as served, opened(served, ENDLESS | {"stream": False}) as connection:
        until(lambda: served.service.figures().completion_tokens > 3)
        assert not served.service.stop(0)
        status, found, _ = served.post(CHAT, ENDLESS)
        assert status == 503
        assert "stopping" in found["error"]["message"]
        served.engine.close()
        head = connection.recv(65536)
        assert b"503" in head.split(b"\r\n")[0]


def test_a_stream_is_kept_alive_while_a_long_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlxfun.serving import lanes
    from mlxfun.serving.http import answers

    monkeypatch.setattr(lanes, "CPU_PREFILL", 16)
    monkeypatch.setattr(lanes, "GPU_PREFILL", 16)
    monkeypatch.setattr(answers, "KEEP_ALIVE_SECONDS", 0.0001)
    with serving("load demo") as served:
        text = "one two three " * 60
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": True}
        status, found, _ = served.post(CHAT, body)
        assert status == 200
        assert ": keep-alive\n\n" in found.split('"finish_reason"')[1]
        status, found, _ = served.post("/v1/messages", body | {"model": "claude-x"})
        assert "event: ping" in found
