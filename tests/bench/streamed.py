"""What a model on disk costs against the same model in memory: time and peak memory, as ratios.

    python tests/bench/streamed.py                          # 1.2 GB, for the CPU backend
    python tests/bench/streamed.py --preset qwen3-30b-a3b   # 16 GB, for a GPU
    python tests/bench/streamed.py --only collect,merge --layers 8
    python tests/bench/streamed.py --use DIRECTORY --data LINES.jsonl --samples 64

Each mode runs in a process of its own, on the same files, after they were read once. Peaks are
above what is held at rest; "processor" is the ratio of the processor's seconds, which other work
on the machine disturbs less; the bound is 1.3 times the largest layer and the hidden states. The last
column adds to those what the same step takes above the model in memory: one batch's forward, and
what an edit makes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import mlx.core as mx
from random_model import PRESETS, Shape, make, write_lines

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.model.places import LayerStore
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions

CPU = Shape(12, 32, 4, 512, 512, 8, 4, 64, 8192, bits=0)
PROMPTS = ("first.jsonl", "second.jsonl")
STEPS = ("collect", "evaluate", "prune", "merge", "abliterate", "save")


class Run:
    """The steps of one mode, in order, each measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        mode, scratch = arguments.mode, arguments.scratch
        began = time.perf_counter()
        options = LoadOptions(resident=mode, scratch=scratch)
        self._session, self._scratch = Session.open(arguments.model, options=options), scratch
        self._data = DatasetOptions(
            str(arguments.data), max_tokens=512, max_samples=arguments.samples
        )
        self._mode = mode
        self.found: dict[str, Any] = {"load": {"seconds": time.perf_counter() - began}}
        self.found["rest"] = int(mx.get_active_memory())
        self.found["width"] = self._session.map.hidden_size
        store = LayerStore.of(self._session.model)
        self.found["largest"] = 0 if store is None else store.largest

    def step(self, name: str) -> None:
        """Run one and note its seconds, and the peak above what is held at rest."""
        rest = int(mx.get_active_memory())
        mx.clear_cache()
        mx.reset_peak_memory()
        began, busy = time.perf_counter(), time.process_time()
        getattr(self, f"_{name}")()
        self.found[name] = {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - busy,
            "peak": int(mx.get_peak_memory()) - rest,
            "held": int(mx.get_active_memory()) - rest,
        }
        print(f"  {self._mode} {name}: {self.found[name]}", file=sys.stderr, flush=True)

    def _collect(self) -> None:
        self.found["tokens"] = self._session.collect(CollectOptions(self._data)).tokens

    def _evaluate(self) -> None:
        self._session.evaluate(EvaluateOptions((self._data,), samples=0))

    def _prune(self) -> None:
        self._session.prune(PruneOptions(n_prune=8))
        self._session.preview(EvaluateOptions((self._data,), samples=0))
        self._session.discard()

    def _merge(self) -> None:
        self._session.merge(MergeOptions(self._data, n_prune=8))
        self._session.apply(ApplyOptions())

    def _abliterate(self) -> None:
        some, other = (DatasetOptions(str(self._scratch / name)) for name in PROMPTS)
        self._session.abliterate(AblateOptions(some, other, answer_tokens=1))
        self._session.apply(ApplyOptions())

    def _save(self) -> None:
        self._session.save(SaveOptions(self._scratch / f"saved-{self._mode}"))


def child(arguments: argparse.Namespace) -> None:
    """One mode, its figures as JSON on stdout."""
    run = Run(arguments)
    for name in STEPS:
        if name in arguments.only.split(","):
            run.step(name)
    run.found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(run.found))


def measured(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """{mode: figures} and what bounds them."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        model = arguments.use or make(shape, root / "model")
        lines = arguments.data or write_lines(
            root / "data.jsonl", arguments.samples, arguments.tokens, shape.vocabulary
        )
        for seed, name in enumerate(PROMPTS):
            write_lines(root / name, 16, 16, shape.vocabulary, 1000 * (seed + 1))
        for file in model.glob("*.safetensors"):  # the page cache is warm for both
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
        found: dict[str, Any] = {}
        for mode in ("all", "none"):
            command = [sys.executable, __file__, "--child", "--mode", mode, "--model", str(model),
                       "--data", str(lines), "--samples", str(arguments.samples), "--scratch", str(root), "--only", arguments.only]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[mode] = json.loads(done.stdout.splitlines()[-1])
    size = 4 if not shape.bits else 2
    tokens = found["none"].pop("tokens", arguments.samples * min(arguments.tokens, 512))
    found["hidden"] = tokens * found["none"]["width"] * size
    return found


def table(found: dict[str, Any], only: Callable[[str], bool]) -> str:
    """The figures as Markdown."""
    least = found["none"]["largest"] + found["hidden"]
    bound = 1.3 * least
    mib = 1 << 20
    rows = [
        f"largest layer {found['none']['largest'] / mib:.0f} MiB, hidden states "
        f"{found['hidden'] / mib:.0f} MiB, bound {bound / mib:.0f} MiB; at rest "
        f"{found['all']['rest'] / mib:.0f} and {found['none']['rest'] / mib:.0f} MiB; resident set "
        f"{found['all']['rss'] / mib:.0f} and {found['none']['rss'] / mib:.0f} MiB",
        "",
        "| step | in memory | on disk | time | processor | peak | of the bound | with what it takes "
        "in memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in filter(only, STEPS):
        one, other = found["all"][name], found["none"][name]
        rows.append(
            f"| {name} | {one['seconds']:.1f} s | {other['seconds']:.1f} s | "
            f"{other['seconds'] / one['seconds']:.2f} | {other['cpu'] / one['cpu']:.2f} | "
            f"{other['peak'] / mib:.0f} MiB | "
            f"{other['peak'] / bound:.2f} | {other['peak'] / (least + one['peak']):.2f} |"
        )
    return "\n".join(rows)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=[*PRESETS, "cpu"], default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--directory", type=Path)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--use", type=Path, help="a model in hand instead of a random one")
    parser.add_argument("--data", type=Path, help="JSONL to run instead of random words")
    for name in ("--model", "--scratch"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """See the module's text."""
    arguments = parsed()
    if arguments.child:
        child(arguments)
        return
    shape = (PRESETS | {"cpu": CPU})[arguments.preset]
    given = {f.name: getattr(arguments, f.name) for f in fields(Shape)}
    shape = replace(shape, **{name: value for name, value in given.items() if value is not None})
    print(table(measured(arguments, shape), lambda name: name in arguments.only.split(",")))


if __name__ == "__main__":
    main()
