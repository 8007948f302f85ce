"""What it costs to hold only some of a model's experts, against holding all and against mmap.

    python tests/bench/slots_cost.py                          # the 30B shape, 16 GB, made on the spot
    python tests/bench/slots_cost.py --preset disk            # 1.6 GB, for the CPU backend
    python tests/bench/slots_cost.py --model DIRECTORY --capacity 8,16,32 --ahead 0,4 --cold

Prints, for each number of slots: tokens a second of decoding, hits, bytes read a token, and the disk's
bandwidth while it was read against that of the same reader on its own. `mmap` is the plain way: the
checkpoint opened lazily by stock mlx-lm, evaluated by a fresh process as its forwards need it.
Answers are compared token by token with those of the whole model, where that fits.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from random_model import PRESETS, Shape, make, words

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

    def line(self, disk: float, answer: list[int] | None) -> str:
        same = "" if answer is None else "same" if answer == self.tokens else "DIFFERENT"
        share = f"{self.bandwidth / disk:.0%}" if disk and self.bandwidth else ""
        return (
            f"{self.way:8} {self.slots:5} {self.ahead:5} {self.rate:9.2f} {self.hits:7.1%} "
            f"{self.read / 2**20:9.1f} {self.bandwidth / 2**20:8.0f} {share:>6} "
            f"{self.peak / 2**30:7.2f} {same}"
        )


HEAD = (
    f"{'way':8} {'slots':>5} {'ahead':>5} {'tokens/s':>9} {'hits':>7} {'MiB/token':>9} "
    f"{'MiB/s':>8} {'disk':>6} {'GiB':>7} answer"
)


def drop_cache(model: Path) -> None:
    """Let the system forget the model's files, where it can be told to."""
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one(args: argparse.Namespace) -> None:
    """Run one way in this process, and print its row as JSON."""
    from mlxfun import Session
    from mlxfun.checkpoint.options import LoadOptions
    from mlxfun.session.residency import endless_decoder

    if args.one == "mmap":
        print(json.dumps(asdict(_mmap(args))))
        return
    options = LoadOptions()
    if args.one == "slots":
        options = LoadOptions(capacity=args.slots, read_ahead=args.read_ahead)
    session = Session.open(args.model, options)
    prompt = session.tokenizer.encode(words(args.prompt, 4000, 7))
    times: list[float] = []

    def heard(index: int, *_: object) -> None:
        if index == 0:
            session.forget_residency()
        times.append(time.perf_counter())

    for seed in (0, 1):  # the first answer fills the slots
        decoder = endless_decoder(session)
        times.clear()
        if args.cold and seed:
            drop_cache(args.model)
        decoder.run(prompt, _greedy(args.tokens), session.editor.key, heard)
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


def _mmap(args: argparse.Namespace) -> Row:
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
    return Row("mmap", 0, 0, found, rate, peak=peak)


def asked(args: argparse.Namespace, way: str, slots: int = 0, ahead: int = 0) -> Row | None:
    """A way in a fresh process; None if it failed, for instance for want of memory."""
    given = [
        sys.executable, __file__, "--one", way, "--model", str(args.model), "--slots", str(slots),
        "--read-ahead", str(ahead), "--tokens", str(args.tokens), "--prompt", str(args.prompt),
    ]  # fmt: skip
    if args.cold:
        drop_cache(args.model)
        given.append("--cold")
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{way} {slots}: FAILED, {done.stderr.strip().splitlines()[-1][:120]}")
        return None
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(args: argparse.Namespace) -> None:
    """The table."""
    from mlxfun.memory.plan.bandwidth import disk_bandwidth
    from mlxfun.memory.plan.headers import outline
    from mlxfun.memory.plan.parts import parts_of

    parts = parts_of(outline(args.model))
    disk = disk_bandwidth(args.model) or 0.0
    print(
        f"{args.model}: {parts.whole / 2**30:.2f} GiB, {parts.experts} experts, top-{parts.top_k}"
    )
    print(f"disk {disk / 2**20:.0f} MiB/s, {'cold' if args.cold else 'warm'} cache of files")
    print(HEAD, flush=True)
    answer = None
    whole = asked(args, "whole") if args.whole else None
    if whole is not None:
        answer = whole.tokens
        print(whole.line(disk, None), flush=True)
    if args.mmap and (plain := asked(args, "mmap")) is not None:
        print(plain.line(disk, answer), flush=True)
    steps = [round(parts.experts * share) for share in (0.25, 0.5, 0.75)]
    for slots in args.capacity or steps:
        for ahead in args.ahead:
            row = asked(args, "slots", max(slots, parts.top_k), ahead)
            if row is not None:
                answer = answer or row.tokens
                print(row.line(disk, answer), flush=True)


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
    parser.add_argument("--cold", action="store_true", help="forget the files before each answer")
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
        measure(args)


if __name__ == "__main__":
    main()
