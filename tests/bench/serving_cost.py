"""What serving costs, as ratios within one run: HTTP clients in a process of their own against
mlx-lm's batch generator stepped in a loop.

    python tests/bench/serving_cost.py --preset small
    python tests/bench/serving_cost.py --preset qwen3-30b-a3b     # on a GPU
    python tests/bench/serving_cost.py --hour 3600                # is memory flat?
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1, 0)]

CLIENT = """
import http.client, json, sys, threading, time
port, count, tokens, stream, length = int(sys.argv[1]), *map(int, sys.argv[2:6])
found, lock = [], threading.Lock()
def one(number):
    prompt = [7 + (number * 31 + i * 17) % 4000 for i in range(length)]
    body = {"prompt": prompt, "max_tokens": tokens, "stream": bool(stream),
            "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    c.request("POST", "/v1/completions", json.dumps(body))
    answer = c.getresponse()
    first, raw = None, b""
    while part := answer.read1(65536):
        if first is None and b'"text"' in part:
            first = time.perf_counter() - began
        raw += part
    said = int(raw.rsplit(b'"completion_tokens":', 1)[1].split(b",")[0])
    c.close()
    with lock:
        found.append((first, said))
threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
began = time.perf_counter()
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps({"seconds": time.perf_counter() - began, "tokens": sum(f[1] for f in found),
                  "first": sorted(f[0] for f in found)}))
"""


HOUR = """
import http.client, json, random, sys, threading
port, clients, each = map(int, sys.argv[1:4])
def one(seed):
    rng = random.Random(seed)
    for number in range(each):
        shared = [7 + i % 50 for i in range(rng.choice((8, 40)))]
        prompt = shared + [rng.randrange(7, 4000) for _ in range(rng.randrange(1, 40))]
        gone = number % 10 == 9
        body = {"prompt": prompt, "max_tokens": 400 if gone else rng.randrange(1, 6), "stream": gone}
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        c.request("POST", "/v1/completions", json.dumps(body))
        answer = c.getresponse()
        answer.read1(10) if gone else answer.read()
        answer.close(); c.close()
threads = [threading.Thread(target=one, args=(n + int(sys.argv[4]),)) for n in range(clients)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
"""Requests of many shapes, as fast as they are answered; of ten one hangs up in mid-answer."""


def prompt_of(number: int, length: int) -> list[int]:
    """The prompt that client `number` sends."""
    return [7 + (number * 31 + i * 17) % 4000 for i in range(length)]


class Alone:
    """The batch generator in a loop, on a thread of its own, as the worker has one."""

    def __init__(self, path: Path, clients: int, tokens: int, length: int) -> None:
        self._run = (path, clients, tokens, length)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._rate = 0.0
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def rate(self) -> float:
        """Tokens a second of one run."""
        self._go.release()
        self._done.acquire()
        return self._rate

    def _loop(self) -> None:
        from mlx_lm import load
        from mlx_lm.generate import BatchGenerator

        path, clients, tokens, length = self._run
        model, _ = load(str(path))
        while True:
            self._go.acquire()
            generator = BatchGenerator(
                model,
                max_tokens=tokens,
                completion_batch_size=clients,
                stream=mx.default_stream(mx.default_device()),
            )
            began, count = time.perf_counter(), 0
            left = set(generator.insert([prompt_of(n, length) for n in range(clients)]))
            while left:
                for response in generator.next_generated():
                    count += 1
                    if response.finish_reason is not None:
                        left.discard(response.uid)
            self._rate = count / (time.perf_counter() - began)
            generator.close()
            self._done.release()


def asked(port: int, clients: int, tokens: int, stream: bool, length: int) -> dict[str, Any]:
    """What clients in another process saw."""
    words = [str(port), str(clients), str(tokens), str(int(stream)), str(length)]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *words], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rate(port: int, clients: int, tokens: int, stream: bool, length: int) -> float:
    """Tokens a second of one run."""
    run = asked(port, clients, tokens, stream, length)
    return float(run["tokens"] / run["seconds"])


def agent_share(port: int, turns: int = 20) -> float:
    """The share of prompts' tokens that came from the cache in a session that grows."""
    import http.client

    history = [{"role": "system", "content": "You are a careful assistant. " * 40}]
    cached = total = 0
    for turn in range(turns):
        history.append({"role": "user", "content": f"Step {turn}: look at file {turn}."})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        body = {"messages": history, "max_tokens": 12}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        found = json.loads(connection.getresponse().read())
        connection.close()
        usage = found["usage"]
        cached += usage["prompt_tokens_details"]["cached_tokens"]
        total += usage["prompt_tokens"]
        history.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
    return cached / total


def slot_seconds(served: Any) -> float:
    """How long a slot stays taken after its client has hung up."""
    import http.client

    found = []
    for _ in range(5):
        port = served.server.address.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": prompt_of(1, 8), "max_tokens": 4000, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        answer.read1(10)
        answer.close()
        connection.close()
        began = time.perf_counter()
        while served.service.figures().in_flight:
            time.sleep(0.0005)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def hour(served: Any, requests: int, clients: int = 8) -> dict[str, float]:
    """Memory after the first tenth of so many requests, and how much more there is at the end."""
    found = []
    port = served.server.address.port
    for part in range(10):
        words = [str(port), str(clients), str(requests // clients // 10), str(1000 * part)]
        subprocess.run([sys.executable, "-c", HOUR, *words], check=True)
        while served.service.figures().in_flight:
            time.sleep(0.01)
        gc.collect()
        found.append((mx.get_active_memory(), resident()))
    mib = 1 << 20
    return {
        "requests": requests // clients // 10 * 10 * clients,
        "active MiB at first": round(found[0][0] / mib, 1),
        "active MiB more at the end": round((found[-1][0] - found[0][0]) / mib, 1),
        "process MiB at first": round(found[0][1] / mib, 1),
        "process MiB more at the end": round((found[-1][1] - found[0][1]) / mib, 1),
    }


def measure(path: Path, rounds: int, clients: int, tokens: int, length: int) -> dict[str, Any]:
    """All ratios, the median of rounds in which everything runs once, one after the other."""
    from serving_rigs import serving

    alone = Alone(path, clients, tokens, length)
    alone.rate()
    load = f"load {path}"
    # No prompt is cached: the generator alone reads all of them, too.
    more = {"cache_bytes": 0, "max_input_tokens": 100_000}
    ratios: dict[str, list[float]] = {}
    against: dict[str, list[float]] = {}
    with (
        serving(load, **more) as off,
        serving(load, count="lightweight", **more) as light,
        serving(load, count="full", **more) as full,
        serving(load, max_input_tokens=100_000) as cached,
    ):
        servers = {"counting off": off, "counting lightweight": light, "counting full": full}
        for _ in range(rounds):
            engine = alone.rate()
            for name, served in servers.items():
                port = served.server.address.port
                for how, stream in (("whole", False), ("streamed", True)):
                    found = rate(port, clients, tokens, stream, length)
                    ratios.setdefault(f"{name}, {how}", []).append(found / engine)
            for name in list(servers)[1:]:
                for how in ("whole", "streamed"):
                    counted, plain = (
                        ratios[f"{name}, {how}"][-1],
                        ratios[f"counting off, {how}"][-1],
                    )
                    against.setdefault(f"{name}, {how}", []).append(counted / plain)
            ratios.setdefault("alone again", []).append(alone.rate() / engine)
        port = off.server.address.port
        first = [asked(port, count, 4, True, length)["first"][-1] for count in (1, 4)]
        return {
            "tokens a second against the batch generator alone": {
                name: round(statistics.median(some), 3) for name, some in ratios.items()
            },
            "tokens a second against counting off": {
                name: round(statistics.median(some), 3) for name, some in against.items()
            },
            "last first token of 4 streams against that of 1": round(first[1] / first[0], 2),
            "slot freed after, seconds": round(slot_seconds(off), 4),
            "agent session from cache, share": round(agent_share(cached.server.address.port), 3),
        }


def main() -> None:
    """Measure a random model of some shape."""
    import random_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(random_model.PRESETS), default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--hour", type=int, metavar="N", help="only memory, over N requests")
    given = parser.parse_args()
    if given.hour:
        from serving_rigs import serving

        with serving("load demo", cache_bytes=8 << 20, count="full") as served:
            print(json.dumps(hour(served, given.hour), indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = random_model.make(random_model.PRESETS[given.preset], Path(folder) / "model")
        sizes = (given.rounds, given.clients, given.tokens, given.length)
        print(json.dumps(measure(path, *sizes), indent=1))


if __name__ == "__main__":
    main()
