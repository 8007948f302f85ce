"""The program with --serve, as its users start and stop it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.warm.programs import SHELL, command

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def program(*words: str, **more) -> Iterator[tuple[subprocess.Popen, int]]:
    """A running program and the port that it serves at."""
    started = subprocess.Popen(
        [*command(SHELL), *words],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip
    try:
        port = None
        for line in started.stderr:
            if found := re.search(r"serving at http://127\.0\.0\.1:(\d+)/v1", line):
                port = int(found[1])
                break
        assert port is not None
        until_ready(port)
        yield started, port
    finally:
        started.kill()
        started.communicate()


def until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while asked(port, "GET", "/health")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def asked(port: int, method: str, path: str, body: object = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_sigterm_completes_answers_and_exits_with_0() -> None:
    with program("--demo", "--headless", "--serve", "127.0.0.1:0") as (started, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 120}
        body |= {"stream": True, "logit_bias": {"2": -100}}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        first = answer.read1()
        started.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
        connection.close()
        assert first
        assert rest.endswith("data: [DONE]\n\n")
        assert started.wait(timeout=60) == 0
        said = started.stderr.read()
        assert "Traceback" not in said


def test_the_ancestors_first_curl_works_word_for_word() -> None:
    words = ("--demo", "--plain", "--serve", "127.0.0.1:0")
    with program(*words, stdin=subprocess.PIPE) as (started, port):
        status, text = asked(
            port,
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
        )
        assert status == 200
        assert json.loads(text)["choices"][0]["message"]["content"]
        started.stdin.write("prune --n-prune 2\n")  # needs statistics: the shell goes on
        started.stdin.close()
        started.stdin = None
        assert started.wait(timeout=60) == 1


def test_the_ancestors_serve_counts_and_saves_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "online.npz"
    words = ("serve", "--model", "demo", "--port", "0", "--mode", "full", "--auto-save", str(path))
    with program(*words) as (started, port):
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        assert asked(port, "POST", "/v1/chat/completions", body)[0] == 200
        found = json.loads(asked(port, "GET", "/v1/reap/stats")[1])
        assert found["token_count"] > 10
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 0
        assert np.load(path)["reap_sum"].sum() > 0


def test_sigterm_in_the_middle_saves_what_was_counted_to_the_last_token(tmp_path: Path) -> None:
    path = tmp_path / "online.npz"
    words = ("--demo", "--headless", "--serve", "127.0.0.1:0", "--mode", "full")
    with program(*words, "--auto-save", str(path)) as (started, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": [7, 8, 9], "max_tokens": 120, "stream": True, "logit_bias": {"2": -100}}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.read1()
        started.send_signal(signal.SIGTERM)
        assert answer.read().decode().endswith("data: [DONE]\n\n")
        connection.close()
        assert started.wait(timeout=60) == 0
    counted = np.load(path)
    assert (counted["tokens"], counted["samples"]) == (3 + 120, 1)
    assert counted["freq"].sum() == (3 + 120) * 6 * 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--demo", "--plain", "--token", "x"), "--token needs --serve"),
        (("--demo", "--plain", "--serve", "0.0.0.0:0"), "give --token"),
        (("--plain", "--serve", "demo"), "no address"),
        (("--demo", "--plain", "--serve", "--allow-commands"), "--allow-commands"),
        (("--demo", "--plain", "--serve", "--auto-save", "x.npz"), "--auto-save needs --mode"),
        (("--demo", "--plain", "--serve", "--steering-mode", "safe"), "needs --safety-map"),
        (("--demo", "--plain", "--serve", "--prompt-cache-bytes", "x"), "--prompt-cache-bytes"),
    ],
)
def test_options_that_do_not_go_together_are_said(words, sentence) -> None:
    ended = subprocess.run(
        [*command(SHELL), *words],
        check=False,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
