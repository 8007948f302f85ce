"""What it costs to hold only some of a model's experts, against holding all and against mmap.

    python tests/bench/slots_cost.py                          # the 30B shape, 16 GB, made on the spot
    python tests/bench/slots_cost.py --preset disk            # 1.6 GB, for the CPU backend
    python tests/bench/slots_cost.py --model DIRECTORY --capacity 8,16,32 --ahead 0,4 --cache cold
    python tests/bench/slots_cost.py --model DIRECTORY --json slots.json

Prints, for a warm and a cold cache of files and each number of slots: tokens a second of decoding,
hits, bytes read a token, and the bytes a second while experts were read, also as a share of what the
disk gives to one long read of several threads. Two plain ways beside it: `mmap` has the least of the
numbers of slots, and copies what is missing out of maps of the files, by page faults; `lazy` is the
checkpoint opened lazily by stock mlx-lm, which keeps all that its forwards have needed. Answers are compared token by
token with those of the whole model, where that fits.

Cold means that the system was told to forget the files before each answer, which Linux does for what
is not in use; a virtual machine's disk may be remembered outside of it, so that the long read, which
is of parts of the files that nothing read before, is the slower of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from random_model import PRESETS, Shape, make, words

SEQUENTIAL, PART = 1 << 30, 8 << 20
"""Bytes of the long read, and of each of its parts."""

MAPS: dict[Path, Any] = {}
"""Maps of files, of the process that reads by page faults."""

SHAPES = PRESETS | {"disk": Shape(8, 32, 4, 512, 1024, 8, 2, 64, 8192, bits=0)}
MOST_READ = 512


@dataclass
class Row:
    """One way of running. seconds: of decoding; peak: most memory of the process, bytes."""

    way: str
    slots: int
    ahead: int
    tokens: list[int]
    rate: float
    hits: float = 0.0
    read: float = 0.0
    bandwidth: float = 0.0
    peak: int = 0
    cold: bool = False

    def line(self, disk: float, answer: list[int] | None) -> str:
        same = "" if answer is None else "same" if answer == self.tokens else "DIFFERENT"
        known = self.cold and disk and self.bandwidth
        share = f"{self.bandwidth / disk:.0%}" if known else ""
        return (
            f"{'cold' if self.cold else 'warm':5} {self.way:8} {self.slots:5} {self.ahead:5} {self.rate:9.2f} {self.hits:7.1%} "
            f"{self.read / 2**20:9.1f} {self.bandwidth / 2**20:8.0f} {share:>6} "
            f"{self.peak / 2**30:7.2f} {same}"
        )


HEAD = (
    f"{'cache':5} {'way':8} {'slots':>5} {'ahead':>5} {'tokens/s':>9} {'hits':>7} {'MiB/token':>9} "
    f"{'MiB/s':>8} {'disk':>6} {'GiB':>7} answer"
)


def drop_cache(model: Path) -> None:
    """Let the system forget the model's files, where it can be told to."""
    MAPS.clear()  # what is mapped is in use
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.fsync(descriptor)  # what is not on the disk yet is not forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one(args: argparse.Namespace) -> None:
    """Run one way in this process, and print its row as JSON."""
    from mlxfun import Session
    from mlxfun.checkpoint.options import LoadOptions
    from mlxfun.session.residency import endless_decoder

    if args.one == "lazy":
        print(json.dumps(asdict(_lazy(args))))
        return
    if args.one == "mmap":
        read_by_page_faults()
    options = LoadOptions()
    if args.one in ("slots", "mmap"):
        options = LoadOptions(capacity=args.slots, read_ahead=args.read_ahead)
    session = Session.open(args.model, options)
    prompt = session.tokenizer.encode(words(args.prompt, 4000, 7))
    times: list[float] = []

    def heard(index: int, *_: object) -> None:
        if index == 0:
            session.forget_residency()
        times.append(time.perf_counter())

    for _ in range(2):  # the first answer fills the slots
        endless_decoder(session).run(prompt, _greedy(args.tokens), session.editor.key, heard)
    if args.cold:
        drop_cache(args.model)
    decoder = endless_decoder(session)
    times.clear()
    answer = decoder.run(prompt, _greedy(args.tokens), session.editor.key, heard)
    report = session.residency()
    row = Row(
        args.one, args.slots, args.read_ahead, list(answer.tokens),
        (len(times) - 1) / (times[-1] - times[0]), report.hit_rate, report.bytes_per_token,
        report.bandwidth, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip
    print(json.dumps(asdict(row)))


def _greedy(tokens: int):  # type: ignore[no-untyped-def]
    from mlxfun.generation.options import GenerateOptions

    return GenerateOptions(max_tokens=tokens)


def read_by_page_faults() -> None:
    """From now on experts are copied out of maps of the files, one after the other."""
    import numpy as np

    from mlxfun.memory.slots.reader import FileReader, Wanted

    def read(self: FileReader, wanted: Iterable[Wanted]) -> None:
        began = time.perf_counter()
        for part in wanted:
            file = self._files[part.file][0]
            if file not in MAPS:
                MAPS[file] = np.memmap(file, np.uint8, "r")
            np.asarray(part.into)[:] = MAPS[file][part.start : part.end]
            self.traffic.bytes += len(part.into)
        self.traffic.seconds += time.perf_counter() - began

    FileReader.read = read  # type: ignore[method-assign]


def _lazy(args: argparse.Namespace) -> Row:
    """Stock mlx-lm on lazily opened weights: every array is read when it is first needed."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model, load_tokenizer

    model, _ = load_model(args.model, lazy=True)
    prompt = load_tokenizer(args.model).encode(words(args.prompt, 4000, 7))
    cache, token, times, found = make_prompt_cache(model), mx.array([prompt]), [], []
    for _ in range(args.tokens):
        token = mx.argmax(model(token, cache=cache)[:, -1], axis=-1)[:, None]
        found.append(int(token.item()))
        times.append(time.perf_counter())
    rate = (len(times) - 1) / (times[-1] - times[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row("lazy", 0, 0, found, rate, peak=peak)


def asked(args: argparse.Namespace, way: str, slots: int, ahead: int, cold: bool) -> Row | None:
    """A way in a fresh process; None if it failed, for instance for want of memory."""
    given = [
        sys.executable, __file__, "--one", way, "--model", str(args.model), "--slots", str(slots),
        "--read-ahead", str(ahead), "--tokens", str(args.tokens), "--prompt", str(args.prompt),
    ]  # fmt: skip
    if cold:
        drop_cache(args.model)
        given.append("--cold")
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{way} {slots}: FAILED, {done.stderr.strip().splitlines()[-1][:120]}")
        return None
    return replace(Row(**json.loads(done.stdout.strip().splitlines()[-1])), cold=cold)


def sequential(model: Path) -> float:
    """Bytes a second of one long read by several threads, of the end of the files, which the reads of
    experts come to last."""
    import numpy as np

    from mlxfun.memory.slots.reader import WORKERS

    files = sorted(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    parts: list[tuple[Path, int]] = []
    for file in reversed(files):
        parts += [(file, start) for start in range(0, file.stat().st_size - PART, PART)][::-1]
    parts = parts[: SEQUENTIAL // PART]
    parts.sort(key=lambda part: (part[0].name, part[1]))
    drop_cache(model)
    buffers = [np.empty(PART, np.uint8) for _ in range(WORKERS)]

    def share(worker: int) -> None:
        for file, start in parts[worker::WORKERS]:
            with file.open("rb", buffering=0) as opened:
                os.preadv(opened.fileno(), [buffers[worker].data], start)

    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(share, range(WORKERS)))
    return len(parts) * PART / (time.perf_counter() - began)


def measure(args: argparse.Namespace) -> list[Row]:
    """The table."""
    from mlxfun.memory.plan.headers import outline
    from mlxfun.memory.plan.parts import parts_of

    parts = parts_of(outline(args.model))
    print(
        f"{args.model}: {parts.whole / 2**30:.2f} GiB, {parts.experts} experts, top-{parts.top_k}"
    )
    disk = sequential(args.model)
    print(f"disk {disk / 2**20:.0f} MiB/s in one long read")
    print(HEAD, flush=True)
    steps = [round(parts.experts * share) for share in (0.25, 0.5, 0.75)]
    slots = [max(n, parts.top_k) for n in args.capacity or steps]
    ways = [("whole", 0, 0)] * args.whole + [("lazy", 0, 0)] * args.mmap
    ways += [("mmap", slots[0], 0)] * args.mmap
    ways += [("slots", n, ahead) for n in slots for ahead in args.ahead]
    rows: list[Row] = []
    for cold in (one == "cold" for one in args.cache):
        for way, count, ahead in ways:
            row = asked(args, way, count, ahead, cold)
            if row is not None:
                rows.append(row)
                print(row.line(disk, rows[0].tokens), flush=True)
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--model", type=Path, help="a model in hand instead of a random one")
    parser.add_argument("--keep", type=Path, help="make the random model here and leave it there")
    parser.add_argument("--capacity", type=numbers, help="slots a layer, by commas")
    parser.add_argument("--ahead", type=numbers, default=[0], help="experts read ahead, by commas")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument(
        "--cache", type=lambda text: text.split(","), default=["warm", "cold"],
        help="warm, cold or both, by commas",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-whole", dest="whole", action="store_false")
    parser.add_argument("--no-mmap", dest="mmap", action="store_false")
    parser.add_argument("--layers", type=int, help="of the random model")
    for hidden, kind in (("--one", str), ("--slots", int), ("--read-ahead", int)):
        parser.add_argument(hidden, type=kind, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    with tempfile.TemporaryDirectory(prefix="mlxfun-model-") as scratch:
        if args.model is None:
            args.model = args.keep or Path(scratch)
            if not (args.model / "config.json").exists():
                shape = SHAPES[args.preset]
                shape = shape if args.layers is None else replace(shape, layers=args.layers)
                make(shape, args.model)
        rows = measure(args)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
