"""What the shell costs on a large model, against stock MLX, as ratios within one process.

    python tests/bench/at_scale.py                       # the 30B shape: a GPU, or 32 GB and patience
    python tests/bench/at_scale.py --preset small        # a laptop, or the CPU backend
    python tests/bench/at_scale.py --model DIRECTORY     # a model in hand
    python tests/bench/at_scale.py --only chat,collect --layers 12

Prints a table: what was measured, what it is compared with, the ratio, and the peak of memory above
the model. The model is random and made on the spot, layer by layer; any shape by flags.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import inside_cost
import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler
from random_model import PRESETS, Shape, make, write_lines

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.events import Event, Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.narrow.options import NarrowOptions
from mlxfun.techniques.prune.options import PruneOptions

GIB = 1 << 30
ANSWER = 96


class Times(Context):
    """When each token of an answer came; of two sides, from the first token of the second on, as the
    reading of its prompt is no part of the rate."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self._sides: set[str] = set()

    def emit(self, event: Event) -> None:
        if not isinstance(event, Token):
            return
        if event.side not in self._sides:
            self._sides.add(event.side)
            self.at.clear()
        self.at.append(time.perf_counter())

    def rate(self) -> float:
        """Tokens per second, from the first to the last."""
        return (len(self.at) - 1) / max(self.at[-1] - self.at[0], 1e-9)


class Layers(Context):
    """Tells how far an edit is, every eighth layer: the first ones on a GPU compile its kernels."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        if unit == "layers" and (done % 8 == 0 or done in (1, 2)):
            print(
                f"  {label} {done} of {total}, {time.perf_counter() - self.began:.0f} s", flush=True
            )


class Bench:
    """One resident model and the rows of the table."""

    def __init__(self, model: Path, pairs: int, length: int) -> None:
        self.pairs, self.path = pairs, model
        self.rows: list[tuple[str, ...]] = []
        mx.reset_peak_memory()
        began = time.perf_counter()
        self.session = Session.open(str(model))
        took = time.perf_counter() - began
        self.base = mx.get_active_memory()
        peak = mx.get_peak_memory()
        self.row(
            "load",
            f"{took:.1f} s, {self.base / GIB:.2f} GiB",
            peak / self.base,
            None,
            "peak / model",
        )
        self.vocabulary = self.session.anatomy.vocabulary or 1000
        self.work = Path(tempfile.mkdtemp(prefix="mlxfun-bench-"))
        self.length = length
        self.data = write_lines(self.work / "a.jsonl", 16, length - 4, self.vocabulary)
        self.other = write_lines(self.work / "b.jsonl", 16, length - 4, self.vocabulary, 99)

    def row(self, what: str, figure: str, ratio: float | None, peak: int | None, note: str) -> None:
        above = "" if peak is None else f"{(peak - self.base) / GIB:.2f}"
        shown = "" if ratio is None else f"{ratio:.2f}"
        self.rows.append((what, figure, shown, above, note))
        print(" | ".join(self.rows[-1]), flush=True)

    def measured(self, work: Callable[[], Any]) -> tuple[float, int]:
        """(seconds, peak bytes) of one run."""
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        began = time.perf_counter()
        work()
        mx.synchronize()
        return time.perf_counter() - began, mx.get_peak_memory()

    # -- answers ------------------------------------------------------------------------------

    def stock(self, prompt: list[int]) -> float:
        """Tokens per second of stock `stream_generate` on the bare model."""
        self.session.taps.detach()
        times = Times()
        try:
            for _ in stream_generate(
                self.session.model, self.session.tokenizer, prompt, max_tokens=ANSWER,
                sampler=make_sampler(0.0),
            ):  # fmt: skip
                times.at.append(time.perf_counter())
        finally:
            self.session.taps.attach()
        return times.rate()

    def chat(self, counting: bool = False) -> None:
        """Rates of an answer with its routing shown."""
        options = GenerateOptions(max_tokens=ANSWER)
        prompt = [2, *range(10, 60), 3]
        text = " ".join(f"w{i}" for i in range(10, 60))
        self.session.set_counting(counting)

        def ours() -> float:
            times = Times()
            self.session.reset_chat()
            self.session.chat(text, options, times)
            return times.rate()

        self.versus_stock("chat, counted" if counting else "chat, routing shown", ours, prompt)
        self.session.set_counting(False)

    def versus_stock(self, name: str, ours: Callable[[], float], prompt: list[int]) -> None:
        self.stock(prompt), ours()
        pairs = [(self.stock(prompt), ours()) for _ in range(self.pairs)]
        ratio = median(b / a for a, b in pairs)
        rates = [median(side) for side in zip(*pairs, strict=True)]
        self.row(name, f"{rates[1]:.1f} of {rates[0]:.1f} tokens/s", ratio, None, "of stock")

    def ab(self) -> None:
        """Both sides of a staged prune in turn; the rate is that of one side alone."""
        self.session.collect(self.collecting())
        self.session.prune(PruneOptions(n_prune=self.session.anatomy.num_experts // 4))
        text = " ".join(f"w{i}" for i in range(10, 60))

        def ours() -> float:
            times = Times()
            self.session.reset_chat()
            self.session.ab(text, GenerateOptions(max_tokens=ANSWER), times)
            return times.rate()

        self.versus_stock("A/B, both sides together", ours, [2, *range(10, 60), 3])
        self.session.discard()

    # -- forwards -----------------------------------------------------------------------------

    def collecting(self) -> CollectOptions:
        return CollectOptions(
            DatasetOptions(str(self.data), text_key="text", max_tokens=self.length + 8)
        )

    def forward(self, rows: int, head: bool) -> None:
        """A plain forward of `rows` of the data set by the bare model."""
        self.session.taps.detach()
        tokens = mx.random.randint(4, self.vocabulary, (rows, self.length))
        try:
            inner: Any = self.session.model if head else self.session.model.model
            mx.eval(inner(tokens))
        finally:
            self.session.taps.attach()

    def forwards(self, head: bool = False) -> tuple[float, int]:
        """All of the data set by the bare model, in the batches that collect makes."""
        from mlxfun.model.device.batch_size import batch_size

        size = batch_size(self.session.model, self.session.anatomy)
        rows = max(1, min(size.rows, size.tokens // self.length))
        return self.measured(lambda: [self.forward(rows, head) for _ in range(14 // rows)])

    def collect(self) -> None:
        self.forwards(), self.session.collect(self.collecting())
        plain = self.forwards()
        tokens = 14 * self.length
        report: list[Any] = []
        seconds, peak = self.measured(
            lambda: report.append(self.session.collect(self.collecting()))
        )
        self.row("plain forward, no head", f"{tokens / plain[0]:.0f} tokens/s", None, plain[1], "")
        rate = report[0].tokens / seconds
        ratio = (peak - self.base) / max(plain[1] - self.base, 1)
        self.row(
            "collect, time", f"{rate:.0f} tokens/s", rate / (tokens / plain[0]), peak, "of plain"
        )
        self.row("collect, peak above the model", "", ratio, peak, "of plain's")

    def scan(self) -> None:
        plain = self.forwards()
        options = ScanOptions(
            self.collecting().data, replace(self.collecting().data, source=str(self.other)),
            self.work / "scan.json", domain_name="bench",
        )  # fmt: skip
        _, peak = self.measured(lambda: self.session.domain_scan(options))
        ratio = (peak - self.base) / max(plain[1] - self.base, 1)
        self.row("scan, peak above the model", "", ratio, peak, "of plain's")

    def evaluate(self) -> None:
        self.session.collect(self.collecting())
        self.session.prune(PruneOptions(n_prune=self.session.anatomy.num_experts // 4))
        options = EvaluateOptions((self.collecting().data,))
        seconds, peak = self.measured(lambda: self.session.evaluate(options))
        plain = self.forwards()
        cost = (seconds / 32) / (plain[0] / 14)
        self.row("evaluate, two states", f"{seconds:.1f} s", cost, peak, "time of plain forwards")
        self.session.discard()

    def ablate(self) -> None:
        plain = self.forwards()
        kinds = [
            write_lines(self.work / f"prompts{seed}.jsonl", 64, 120, self.vocabulary, seed)
            for seed in (1, 2)
        ]
        harmful, harmless = (DatasetOptions(str(k), text_key="text", max_tokens=256) for k in kinds)
        options = AblateOptions(harmful=harmful, harmless=harmless)
        seconds, peak = self.measured(lambda: self.session.abliterate(options))
        ratio = (peak - self.base) / max(plain[1] - self.base, 1)
        self.row("abliterate, peak above the model", f"{seconds:.1f} s", ratio, peak, "of plain's")
        self.session.discard()

    # -- edits --------------------------------------------------------------------------------

    def recipe(self) -> None:
        """The prune that the guide recommends."""
        self.session.collect(self.collecting())
        options = PruneOptions(
            n_prune=self.session.anatomy.num_experts // 4, metric="output_error", refit_experts=True
        )
        seconds, peak = self.measured(lambda: self.session.prune(options, Layers()))
        self.row("prune --metric output_error --refit-experts", f"{seconds:.1f} s", None, peak, "")
        self.session.discard()

    def narrow(self) -> None:
        """A quarter of the neurons of every expert, single ones of packed experts, refitted."""
        self.session.collect(self.collecting())
        options = NarrowOptions(fraction=0.25, requantize=True)
        seconds, peak = self.measured(lambda: self.session.narrow(options, Layers()))
        each = seconds / len(self.session.anatomy.layers)
        figure = f"{seconds:.1f} s, {each:.2f} s a layer"
        self.row("narrow --fraction 0.25 --requantize", figure, None, peak, "")
        self.session.discard()

    def merge(self) -> None:
        data = self.collecting().data
        count = self.session.anatomy.num_experts // 4
        seconds, peak = self.measured(
            lambda: self.session.merge(MergeOptions(data, n_prune=count), Layers())
        )
        self.row(f"merge {count} experts a layer", f"{seconds:.1f} s", None, peak, "")
        self.session.apply(ApplyOptions())
        seconds, peak = self.measured(self.session.undo)
        self.row("undo of the merge", f"{seconds:.1f} s", None, peak, "")

    def save(self) -> None:
        from mlxfun.checkpoint.options import SaveOptions

        self.session.collect(self.collecting())
        self.session.prune(PruneOptions(n_prune=self.session.anatomy.num_experts // 4))
        self.session.apply(ApplyOptions())
        target = self.work / "saved"
        seconds, peak = self.measured(lambda: self.session.save(SaveOptions(target)))
        size = sum(f.stat().st_size for f in target.iterdir())
        self.row("prune, apply, save", f"{size / GIB:.1f} GiB in {seconds:.1f} s", None, peak, "")
        self.session.undo()

    def inside(self) -> None:
        """Traces, a lens and patching against plain forwards."""
        for what, figure, peak in inside_cost.rows(
            self.session, min(512, self.length), self.pairs + 2
        ):
            ratio = figure if what.endswith("of plain") else None
            shown = "" if ratio is not None else f"{figure:.2f} s"
            self.row(what, shown, ratio, int(peak) + self.base, "")

    def identity(self) -> None:
        from mlxfun.checkpoint.identity import checkpoint_id

        cache = self.work / "identities.json"
        seconds, _ = self.measured(lambda: checkpoint_id(self.path, cache))
        again, _ = self.measured(lambda: checkpoint_id(self.path, cache))
        self.row(
            "identity of the checkpoint", f"{seconds:.1f} s, again {again:.2f} s", None, None, ""
        )


ALL = ("identity", "chat", "counted", "collect", "scan", "evaluate", "ab", "ablate", "recipe",
       "inside", "narrow", "merge", "save")  # fmt: skip


def parts(bench: Bench, names: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in names:
        if name == "counted":
            yield name, lambda: bench.chat(counting=True)
        else:
            yield name, getattr(bench, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3-30b-a3b")
    parser.add_argument("--model", type=Path, help="a model in hand instead of a random one")
    parser.add_argument("--keep", type=Path, help="make the random model here and leave it there")
    parser.add_argument(
        "--only", default=",".join(ALL), help="comma-separated, of " + ", ".join(ALL)
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a line of the data set")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Shape)}
    shape = replace(PRESETS[args.preset], **{k: v for k, v in given.items() if v is not None})
    with tempfile.TemporaryDirectory(prefix="mlxfun-model-") as scratch:
        where = args.model or args.keep or Path(scratch)
        if args.model is None and not (where / "config.json").exists():
            began = time.perf_counter()
            make(shape, where)
            print(f"{shape}, made in {time.perf_counter() - began:.0f} s", flush=True)
        bench = Bench(where, args.pairs, args.length)
        for name, part in parts(bench, tuple(args.only.split(","))):
            try:
                part()
            except Exception as error:  # the rest of the table is worth having
                traceback.print_exc()
                bench.row(name, f"FAILED: {str(error)[:120]}", None, None, "")
        if args.json:
            args.json.write_text(json.dumps(bench.rows))
        shutil.rmtree(bench.work)


if __name__ == "__main__":
    main()
