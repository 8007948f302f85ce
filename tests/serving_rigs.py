"""A live server on loopback over a real engine, for the tests of serving."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from commands.engine import Engine
from mlxfun.data import demo
from mlxfun.events import Event, JobEnded
from mlxfun.serving.options import Address, ServeOptions
from mlxfun.serving.service import Service

QUESTION = [{"role": "user", "content": "What is a mortgage?"}]

CALLER = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<tool_call>{tool_call.name}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that knows tools, as Hermes-style models write calls of them."""


def caller(folder: Path) -> Path:
    """The demo model with such a template, below `folder`."""
    path = folder / "caller"
    shutil.copytree(demo.model_path(), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CALLER}))
    return path


class Served:
    """A shell that serves. `run` types a command; `post` and `get` are a client of few words."""

    def __init__(self, *lines: str, **options: Any) -> None:
        from commands.routes import routes
        from commands.serving import Running
        from mlxfun.serving.http.server import HttpServer

        self._events: SimpleQueue[Event] = SimpleQueue()
        self.engine = Engine(output_root=options.get("output_root"))
        self.engine.subscribe(self._events.put)
        self.service = Service(ServeOptions(Address(port=0), **options))
        self.engine.serve(self.service)
        self.server = HttpServer(self.service, routes(self.engine, self.service))
        self.engine.served_by(Running(self.service, self.server))
        self._own = threading.Lock()
        for line in lines:
            self.run(line)

    @property
    def url(self) -> str:
        return f"http://{self.server.address}"

    def run(self, line: str) -> Any:
        """Type a command and wait for its report."""
        with self._own:
            job = self.engine.run(line)
            while True:
                event = self._events.get(timeout=60)
                if isinstance(event, JobEnded) and event.job == job:
                    assert event.error is None, event.error
                    return event.report

    def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, body, headers) of an answer. body: JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._asked(
            method, path, raw, {"content-type": "application/json"} | (headers or {})
        )

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        return self._asked("GET", path, None, headers or {})

    def chat(self, text: str = "What is a mortgage?", **more: Any) -> dict[str, Any]:
        """A whole chat completion, which must succeed."""
        messages = [{"role": "user", "content": text}]
        status, found, _ = self.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 24} | more
        )
        assert status == 200, found
        return found

    def _asked(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        address = self.server.address
        connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw = answer.read()
            kind = answer.getheader("content-type", "")
            found = json.loads(raw) if kind.startswith("application/json") else raw.decode()
            return answer.status, found, {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def close(self) -> None:
        self.server.close(5)
        self.engine.close()


@contextmanager
def serving(*lines: str, **options: Any) -> Iterator[Served]:
    """A server that is closed at the end of the block."""
    served = Served(*lines, **options)
    try:
        yield served
    finally:
        served.close()


def said(found: dict[str, Any]) -> str:
    """The text of a chat completion."""
    text = found["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def events(text: str) -> list[Any]:
    """The data of server-sent events, "[DONE]" as it is."""
    found = []
    for line in text.split("\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def streamed(chunks: Sequence[Any]) -> str:
    """The text of a streamed chat completion."""
    choices = [c["choices"][0] for c in chunks if isinstance(c, dict) and c.get("choices")]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
