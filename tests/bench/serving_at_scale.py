"""Our server against stock `mlx_lm.server` on one model: the same clients, in the same run.

    python tests/bench/serving_at_scale.py MODEL --seconds 540
    python tests/bench/serving_at_scale.py MODEL --wheels DIR     # starlette and uvicorn from there
    python tests/bench/serving_at_scale.py --preset qwen3-30b-a3b --seconds 540   # a random model

Each server is a process of its own that holds the model, all of them at once; clients are another
process (standard library only) and ask one server at a time, in turns. What was measured is printed
as it comes, one JSON object a line, and the ratios at the end; nothing new is begun once `--seconds`
are over.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

CLIENT = """
import http.client, json, sys, threading, time
port, count, tokens, words, salt, limit = map(int, sys.argv[1:7])
name = sys.argv[7]
found, lock = [], threading.Lock()
def one(number):
    text = " ".join(f"item {salt} {number} {i * 7919 % 1000}" for i in range(words))
    body = {"model": name, "messages": [{"role": "user", "content": f"Write a very long story about: {text}"}],
            "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    try:
        c.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer, first, usage, last = c.getresponse(), None, None, None
        if answer.status != 200:
            raise OSError(f"status {answer.status}: {answer.read(300)!r}")
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            data = json.loads(line[6:])
            for choice in data.get("choices") or []:
                said = choice.get("delta", {})
                if any(said.get(k) for k in ("content", "reasoning", "reasoning_content")):
                    last = time.perf_counter() - began
                    first = last if first is None else first
            usage = data.get("usage") or usage
        with lock:
            found.append((first, last, usage["completion_tokens"], usage["prompt_tokens"]))
    except Exception as problem:
        with lock:
            found.append((None, None, 0, repr(problem)))
    finally:
        c.close()
threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
began = time.perf_counter()
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps({"seconds": time.perf_counter() - began, "answers": found}))
"""


@dataclass(frozen=True)
class Server:
    """name: in the output. port: where it listens. model: what clients call the model."""

    name: str
    port: int
    model: str


def free_port() -> int:
    """A port that nobody listens at."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(name: str, model: str, port: int, clients: int) -> list[str]:
    """The command line of a server."""
    if name == "stock":
        at = ["--host", "127.0.0.1", "--port", str(port)]
        return [sys.executable, "-m", "mlx_lm.server", "--model", model, *at]
    at = ["--serve", f"127.0.0.1:{port}", "--concurrency", str(max(clients, 16))]
    mode = {
        "ours": [],
        "ours counting": ["--mode", "lightweight"],
        "ours counting all": ["--mode", "full"],
    }
    kv = ["--kv-bits", "8"] if name == "ours packed" else []
    return [sys.executable, "-m", "commands", model, "--headless", *at, *mode.get(name, []), *kv]


@contextmanager
def started(name: str, model: str, given: argparse.Namespace) -> Iterator[Server]:
    """A server that answers."""
    port = free_port()
    log = Path(tempfile.gettempdir()) / f"serving_at_scale_{name.replace(' ', '_')}.log"
    wheels = [str(path) for path in sorted(given.wheels.glob("*.whl"))] if given.wheels else []
    path = os.pathsep.join([str(ROOT), *wheels, os.environ.get("PYTHONPATH", "")])
    with log.open("w") as out:
        process = subprocess.Popen(
            command(name, model, port, given.clients), cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
            stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            began = time.perf_counter()
            until_ready(process, port, log, given.start_seconds)
            tell({"server": name, "ready after": round(time.perf_counter() - began, 1)})
            yield Server(name, port, "default_model")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until_ready(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    """Wait until a server says that it is well. Raises SystemExit with the end of its log."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            ready = connection.getresponse().status == 200
            connection.close()
            if ready:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise SystemExit(f"{log.name}: the server did not start\n{log.read_text()[-2000:]}")


def asked(
    server: Server, count: int, tokens: int, words: int, salt: int, limit: int
) -> dict[str, Any]:
    """What `count` clients at once saw of a server."""
    numbers = map(str, (server.port, count, tokens, words, salt, limit))
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *numbers, server.model],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    good = [answer for answer in found["answers"] if answer[0] is not None]
    bad = [answer[3] for answer in found["answers"] if answer[0] is None]
    said = sum(answer[2] for answer in good)
    return {
        "server": server.name,
        "clients": count,
        "tokens/s": round(said / found["seconds"], 1),
        "completion tokens": said,
        "prompt tokens": sum(answer[3] for answer in good),
        "first token, median s": round(statistics.median(a[0] for a in good), 3) if good else None,
        "first token, last s": round(max(a[0] for a in good), 3) if good else None,
        "failed": bad[:2],
    }


def session(server: Server, turns: int, limit: int, deadline: float) -> dict[str, Any]:
    """An agent-like session: a long system prompt, and turns that each begin like the one before."""
    system = "You are a careful assistant that reads files and reports. " * 60
    history: list[dict[str, str]] = [{"role": "system", "content": system}]
    cached = total = took = 0
    began = time.perf_counter()
    for turn in range(turns):
        if time.monotonic() > deadline:
            break
        history.append({"role": "user", "content": f"Step {turn}: look at file {turn}."})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=limit)
        body = {"model": server.model, "messages": history, "max_tokens": 24, "temperature": 0}
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        found = json.loads(connection.getresponse().read())
        connection.close()
        if "usage" not in found:
            return {"server": server.name, "session failed": str(found)[:300]}
        usage = found["usage"]
        cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        total, took = total + usage["prompt_tokens"], took + 1
        message = found["choices"][0]["message"]
        history.append({"role": "assistant", "content": message.get("content") or ""})
    seconds = time.perf_counter() - began
    return {
        "server": server.name,
        "session, turns": took,
        "s per turn": round(seconds / max(took, 1), 3),
        "prompts from cache": round(cached / max(total, 1), 3),
    }


def tell(found: dict[str, Any]) -> None:
    """Print what was found, at once."""
    print(json.dumps(found), flush=True)


def measured(servers: list[Server], given: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rounds in which each server is asked once, one after the other; ratios to stock, medians."""
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    for turn in range(-1, given.rounds):
        for count in sorted({1, 4, given.clients}):
            for server in servers if turn % 2 else servers[::-1]:
                if time.monotonic() > deadline:
                    return ratios(rates, firsts)
                tokens = 8 if turn < 0 else given.tokens  # the first round warms up
                found = asked(server, count, tokens, given.words, turn, given.limit)
                if turn < 0:
                    continue
                tell(found)
                rates.setdefault((server.name, count), []).append(found["tokens/s"])
                if found["first token, median s"] is not None:
                    key = (server.name, count)
                    firsts.setdefault(key, []).append(found["first token, median s"])
    for server in servers:
        if time.monotonic() < deadline:
            tell(session(server, given.turns, given.limit, deadline))
    return ratios(rates, firsts)


def ratios(
    rates: dict[tuple[str, int], list[float]], firsts: dict[tuple[str, int], list[float]]
) -> dict[str, Any]:
    """Medians of the rounds' ratios to stock: more tokens a second and less waiting are better."""
    out: dict[str, Any] = {}
    for what, table in (("tokens/s against stock", rates), ("first token against stock", firsts)):
        found = out.setdefault(what, {})
        for (name, count), some in table.items():
            stock = table.get(("stock", count), [])
            pairs = [(a, b) for a, b in zip(some, stock, strict=False) if b]
            if name != "stock" and pairs:
                ratio = statistics.median(a / b for a, b in pairs)
                found[f"{name}, {count} clients"] = round(ratio, 3)
    return out


def model_of(given: argparse.Namespace, folder: Path) -> str:
    """The model's directory; a random one is made for a preset."""
    if given.model:
        return str(given.model)
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import random_model

    return str(random_model.make(random_model.PRESETS[given.preset], folder / "model"))


def main() -> None:
    """Measure, within the time that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a model directory")
    parser.add_argument("--preset", default="small", help="without a model: a random one")
    parser.add_argument(
        "--servers",
        default="stock,ours,ours counting",
        help="comma between them; also: ours counting all, ours packed",
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument(
        "--words", type=int, default=40, help="items in a prompt, about 5 tokens each"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=10, help="of the agent-like session")
    parser.add_argument("--seconds", type=float, default=540, help="when nothing new is begun")
    parser.add_argument(
        "--start-seconds", type=float, default=240, help="how long a server may load"
    )
    parser.add_argument("--limit", type=int, default=120, help="seconds that a client waits")
    parser.add_argument(
        "--wheels", type=Path, help="a directory of pure Python wheels for our server"
    )
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = model_of(given, Path(folder))
        names = [name.strip() for name in given.servers.split(",")]
        servers = [stack.enter_context(started(name, model, given)) for name in names]
        tell(measured(servers, given, deadline))


if __name__ == "__main__":
    main()
