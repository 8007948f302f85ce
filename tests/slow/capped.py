"""Calibrates, prunes, merges, ablates and saves a model in a process whose memory the system limits.

    python tests/slow/capped.py --make 4 --work DIR                      # a twin of 4 layers
    python tests/slow/capped.py --make 48 --work DIR --cap 4GiB          # 19 GB in 4
    python tests/slow/capped.py --model DIRECTORY --work DIR --cap 4GiB --prune 32 --merge 16
    python tests/slow/capped.py --model DIRECTORY --work DIR --cap 8GiB --answer 6GiB

The limit is RLIMIT_DATA: private writable memory, which is all that MLX, NumPy and Python allocate.
Pages of files that the system keeps to answer reads are not counted: they are given back whenever
they are wanted. A memory cgroup would count them too, and give them back itself.

Prints a line of JSON for every step: seconds, those of the processor, the largest resident set, and
bytes that came from the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT)]

UNITS = {"": 1, "MiB": 1 << 20, "GiB": 1 << 30}
SETS = {"text": 0, "one": 1, "other": 2}


def amount(text: str) -> int:
    """`4GiB` in bytes."""
    found = re.fullmatch(r"([\d.]+)(MiB|GiB|)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no amount, for instance 4GiB")
    return int(float(found[1]) * UNITS[found[2]])


def limit(cap: int) -> None:
    """Let this process have so many bytes, 0 for as many as there are."""
    if cap:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))


class Meter:
    """Seconds, largest resident set, and bytes that came from the disk, of each step."""

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do it and print its figures."""
        before, began, busy = self._read(), time.perf_counter(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        work()
        row = {
            "step": name,
            "seconds": round(time.perf_counter() - began, 1),
            "cpu": round(time.process_time() - busy, 1),
            "rss": self._status("VmHWM"),
            "disk": self._read() - before,
        }
        print(json.dumps(row), flush=True)

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", text)
        return 1024 * int(found[1]) if found else 0

    @staticmethod
    def _read() -> int:
        found = re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())
        return int(found[1]) if found else 0


def prepare(args: argparse.Namespace) -> None:
    """The model, unless it is there, and three sets of random words."""
    import mlx.core as mx
    from random_model import PRESETS, Shape, make, write_lines

    args.work.mkdir(parents=True, exist_ok=True)
    if args.make and not (args.model / "config.json").exists():
        size = {} if args.preset is None else vars_of(PRESETS[args.preset])
        make(Shape(**(size | {"layers": args.make, "wide": 1})), args.model)
        mx.clear_cache()
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    for name, seed in SETS.items():
        lines, length = (
            (args.samples, args.tokens) if name == "text" else (args.prompts, args.words)
        )
        write_lines(args.work / f"{name}.jsonl", lines, length, vocabulary, 1000 * seed)


def vars_of(shape: object) -> dict[str, int]:
    """The fields of a shape."""
    from dataclasses import asdict

    return asdict(shape)  # type: ignore[call-overload, no-any-return]


def edit(args: argparse.Namespace) -> None:
    """Every step, measured."""
    from mlxfun import Session
    from mlxfun.calibration.options import CollectOptions
    from mlxfun.checkpoint.options import LoadOptions, SaveOptions
    from mlxfun.data.options import DatasetOptions
    from mlxfun.editing.options import ApplyOptions
    from mlxfun.techniques.ablate.options import AblateOptions
    from mlxfun.techniques.merge.options import MergeOptions
    from mlxfun.techniques.prune.options import PruneOptions

    text, one, other = (DatasetOptions(str(args.work / f"{name}.jsonl")) for name in SETS)
    options = LoadOptions(
        resident=args.resident,
        scratch=args.work / "scratch" if args.resident == "none" else None,
    )
    held: list[Session] = []
    saved = args.work / f"saved-{args.resident}"
    meter = Meter()

    def staged(make: Callable[[], object]) -> None:
        make()
        held[0].apply(ApplyOptions())

    few = {"max_similarity_tokens": args.compared, "max_alignment_tokens": args.compared}
    merge = MergeOptions(text, n_prune=args.merge, **few)
    ablate = AblateOptions(one, other, answer_tokens=1)
    meter.step("load", lambda: held.append(Session.open(args.model, options)))
    meter.step("collect", lambda: held[0].collect(CollectOptions(text)))
    meter.step("prune", lambda: staged(lambda: held[0].prune(PruneOptions(n_prune=args.prune))))
    meter.step("merge", lambda: staged(lambda: held[0].merge(merge)))
    meter.step("abliterate", lambda: staged(lambda: held[0].abliterate(ablate)))
    gate: list[dict[str, str]] = []
    meter.step("save", lambda: gate.append(held[0].save(SaveOptions(saved, force=True)).gate))
    size = sum(file.stat().st_size for file in saved.iterdir())
    print(json.dumps({"gate": gate[0], "bytes": size, "sha256": digest(saved)}))


def answer(args: argparse.Namespace) -> None:
    """A few tokens of an answer by a model of which a part is in memory, twice."""
    from mlxfun import Session
    from mlxfun.checkpoint.options import LoadOptions
    from mlxfun.generation.options import GenerateOptions

    held: list[Session] = []
    meter, options = Meter(), GenerateOptions(max_tokens=args.tokens)
    meter.step(
        "load",
        lambda: held.append(Session.open(args.model, LoadOptions(resident=args.answer))),
    )
    said: list[str] = []
    for _ in range(2):
        held[0].reset_chat()
        held[0].forget_residency()
        meter.step("answer", lambda: said.append(held[0].chat("w10 w11 w12 w13", options).text))
        print(json.dumps({"text": said[-1], "residency": held[0].residency().summary()}))


def digest(directory: Path) -> str:
    """SHA-256 over all files but those that name the directory."""
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != "README.md":
            found.update(file.name.encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 22):
                    found.update(block)
    return found.hexdigest()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory for all that is made")
    parser.add_argument("--model", type=Path, help="a model in hand; WORK/model by default")
    parser.add_argument("--make", type=int, help="make the model, of so many layers")
    parser.add_argument("--preset", help="of tests/bench/random_model.py; 30B by default")
    parser.add_argument("--cap", type=amount, default=0, help="of memory, for instance 4GiB")
    parser.add_argument("--resident", default="none", choices=["all", "none"])
    parser.add_argument("--answer", type=amount, help="hold so much, and answer instead of editing")
    parser.add_argument("--prune", type=int, default=32, help="experts a layer")
    parser.add_argument("--merge", type=int, default=16, help="experts a layer, after the prune")
    parser.add_argument("--samples", type=int, default=4, help="of text")
    parser.add_argument("--tokens", type=int, default=16, help="of a sample, or of an answer")
    parser.add_argument("--compared", type=int, default=8, help="tokens experts are compared on")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind, for the ablation")
    parser.add_argument("--words", type=int, default=6, help="of a prompt")
    args = parser.parse_args()
    args.model = args.model or args.work / "model"
    return args


def main() -> None:
    """See the module's text."""
    args = parsed()
    prepare(args)
    limit(args.cap)
    (edit if args.answer is None else answer)(args)


if __name__ == "__main__":
    main()
