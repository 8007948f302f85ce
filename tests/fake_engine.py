"""A command engine without a model, a thread or a clock: it moves only when told to.

`run` queues; each `step` delivers exactly one event of the running job. The scripts below play a
whole session (load, collect, prune, preview, chat, steer, apply, undo, save) on a model of six
layers and sixteen experts whose heat is a smooth, fixed surface.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mlxfun.calibration.reports import CollectReport, WhyReport
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.editing.reports import HistoryNode, HistoryReport, PlanReport, StepReport
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import (
    Event,
    JobEnded,
    JobQueued,
    JobStarted,
    Notice,
    Progress,
    RoutingFrame,
    Token,
)
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report, TextReport
from mlxfun.session.reports import HeatView, InfoReport, SessionView
from tests.fake_hand import COMMANDS as HAND
from tests.fake_hand import EXPERT_BYTES, FakeHand

MIB = 1 << 20
STATES = {0: "a1b2c3d4", 1: "e5f60718"}


@dataclass(frozen=True, slots=True)
class FakeCompletion:
    text: str
    start: int
    hint: str


@dataclass(frozen=True, slots=True)
class FakeRow:
    name: str
    group: str
    help: str
    usage: str
    key: str | None
    danger: bool
    undoable: bool
    enabled: bool
    reason: str


@dataclass(frozen=True, slots=True)
class QuitReport(Report):
    kind: ClassVar[str] = "quit"

    def summary(self) -> str:
        return "bye"


# name, group, help, usage, when: "" always, else what must exist
COMMANDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("load", "model", "Load a model.", "load MODEL", ""),
    ("info", "model", "Describe the resident model.", "info [--verify]", "model"),
    ("layers", "model", "Show the anatomy as a table.", "layers", "model"),
    ("collect", "observe", "Calibrate on a data set.", "collect [OPTIONS]", "model"),
    ("stats", "observe", "Show, save or load statistics.", "stats [ACTION] [PATH]", "model"),
    ("why", "observe", "Say why an expert goes or stays.", "why EXPERT", "stats"),
    ("prune", "edit", "Stage a prune.", "prune [OPTIONS]", "stats"),
    ("steer", "edit", "Force experts in or out.", "steer [OPTIONS]", "model"),
    ("preview", "measure", "Measure the staged model.", "preview [OPTIONS]", "plan"),
    ("evaluate", "measure", "Measure the model.", "evaluate [OPTIONS]", "model"),
    ("chat", "chat", "Talk to the live model.", "chat TEXT", "model"),
    ("apply", "edit", "Commit the staged plan.", "apply [OPTIONS]", "plan"),
    ("discard", "edit", "Drop the staged plan.", "discard", "plan"),
    ("flip", "edit", "Swap base and candidate.", "flip", "plan"),
    ("undo", "history", "Take the last step back.", "undo", "undo"),
    ("redo", "history", "Repeat the step taken back.", "redo", "redo"),
    ("goto", "history", "Go to any state.", "goto NODE", "model"),
    ("history", "history", "Show the tree of states.", "history", "model"),
    ("save", "model", "Write the model.", "save PATH [OPTIONS]", "model"),
    *HAND,
    ("help", "shell", "Explain a command.", "help [COMMAND]", ""),
    ("quit", "shell", "Leave the shell.", "quit", ""),
)

REASONS = {
    "model": "load a model first",
    "stats": "calibrate first: collect --dataset demo:mixed",
    "plan": "nothing is staged: prune --n-prune 4",
    "undo": "nothing to undo",
    "redo": "nothing to redo",
}


def surface(layers: int, experts: int, phase: float = 0.0) -> np.ndarray:
    """A smooth fixed landscape in (0, 1], shape [layers, experts]."""
    rows = np.arange(layers)[:, None]
    columns = np.arange(experts)[None, :]
    return 0.5 + 0.5 * np.sin(columns * 0.55 + rows * 0.8 + phase)


class FakeEngine(FakeHand):
    """See the module. layers, experts: the size of the pretended model."""

    def __init__(self, layers: int = 6, experts: int = 16) -> None:
        self.layers, self.experts = layers, experts
        self.lines: list[str] = []
        self.cancelled = 0
        self.closed: float | None = None
        self._listeners: list[Callable[[Event], None]] = []
        self._waiting: list[tuple[int, str]] = []
        self._running: tuple[int, str] | None = None
        self._script: Iterator[Event | Report] | None = None
        self._jobs = 0
        self._cancel = False
        self._asked: list[str] = []
        self._view = SessionView()

    # The engine's interface -------------------------------------------------------------------
    @property
    def busy(self) -> str | None:
        return self._running[1] if self._running else None

    @property
    def queue(self) -> tuple[str, ...]:
        return tuple(line for _, line in self._waiting)

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        self._listeners.append(listener)

    def run(self, line: str) -> int:
        self._jobs += 1
        self.lines.append(line)
        self._waiting.append((self._jobs, line))
        self._emit(JobQueued(self._jobs, line))
        return self._jobs

    def cancel(self, only: str | None = None) -> None:
        if only is not None and self.busy != only:
            return
        self.cancelled += 1
        self._cancel = True

    def complete(self, line: str) -> list[FakeCompletion]:
        words = line.split(" ")
        start = len(line) - len(words[-1])
        if len(words) == 1:
            options = [(name, help_) for name, _, help_, _, _ in COMMANDS]
        elif words[-2] == "--dataset":
            options = [("demo:mixed", "a bit of everything"), ("demo:eval", "held out")]
        else:
            options = [("--dataset", "what to read"), ("--n-prune", "experts a layer")]
        return [FakeCompletion(t, start, h) for t, h in options if t.startswith(words[-1])]

    def help(self, name: str | None, width: int = 78) -> str:
        for command, _, text, usage, _ in COMMANDS:
            if command == name:
                return f"{usage}\n\n{text}"
        return "\n".join(f"{c[0]}: {c[2]}" for c in COMMANDS)

    def view(self) -> SessionView:
        return self._view

    def rows(self) -> tuple[FakeRow, ...]:
        have = self._have()
        return tuple(
            FakeRow(n, g, h, u, None, False, False, not w or w in have, REASONS[w] if w else "")
            if w and w not in have
            else FakeRow(n, g, h, u, None, False, False, True, "")
            for n, g, h, u, w in COMMANDS
        )

    def close(self, timeout: float = 5.0) -> None:
        self.closed = timeout

    # Time -------------------------------------------------------------------------------------
    def step(self, count: int = 1) -> None:
        """Deliver the next `count` events; does nothing when there is no job."""
        for _ in range(count):
            self._step()

    def finish(self) -> None:
        """Deliver everything that is queued."""
        while self._running or self._waiting:
            self._step()

    def play(self, *lines: str) -> None:
        """Run lines from start to end, before or while a screen listens."""
        for line in lines:
            self.run(line)
            self.finish()

    def notice(self, level: str, text: str) -> None:
        """Emit a notice out of the blue."""
        self._emit(Notice(level, text))

    def _step(self) -> None:
        if self._running is None:
            if self._waiting:
                self._running = job, line = self._waiting.pop(0)
                self._cancel = False
                self._script = self._scripted(job, line)
                self._emit(JobStarted(job, line))
            return
        job, line = self._running
        assert self._script is not None
        if self._cancel:
            self._end(JobEnded(job, line, None, "cancelled", 1.0, self._view.state, True))
            return
        try:
            event = next(self._script)
        except ValueError as error:
            usage = "unknown command" in str(error)
            self._end(JobEnded(job, line, None, str(error), 0.0, self._view.state, usage=usage))
            return
        if isinstance(event, Report):
            seconds = 12.5 if line.startswith("collect") else 0.4
            self._end(JobEnded(job, line, event, None, seconds, self._view.state))
        else:
            self._emit(event)

    def _end(self, ended: JobEnded) -> None:
        self._running = self._script = None
        self._emit(ended)

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    # The pretended session --------------------------------------------------------------------
    def _have(self) -> set[str]:
        view, have = self._view, set[str]()
        if view.model:
            have.add("model")
        if view.heat and view.heat.metrics:
            have.add("stats")
        if view.plan:
            have.add("plan")
        if view.history and view.history.current == 1:
            have.add("undo")
        if view.history and len(view.history.nodes) > 1 and view.history.current == 0:
            have.add("redo")
        return have

    def _scripted(self, job: int, line: str) -> Iterator[Event | Report]:
        words = shlex.split(line)
        script = getattr(self, f"_do_{words[0]}", None)
        if script is None:
            if words[0] not in {name for name, *_ in COMMANDS}:
                raise_later = ValueError(f"unknown command {words[0]!r}; did you mean 'collect'?")
            else:
                yield QuitReport() if words[0] == "quit" else TextReport(f"{words[0]} done")
                return
            raise raise_later
        row = next(r for r in self.rows() if r.name == words[0])
        if not row.enabled:
            raise ValueError(row.reason)
        yield from script(job, words[1:])

    def _do_load(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield Progress(job, "reading weights", 3 * MIB, 6 * MIB, "B", 0.5)
        shape = (self.layers, self.experts)
        report = InfoReport(
            source=args[0],
            model_id="demo-qwen3-moe",
            model_type="qwen3_moe",
            decoder_layers=self.layers,
            moe_layers=self.layers,
            experts=self.experts,
            experts_kept=self.experts,
            top_k=2,
            router="softmax",
            groups=0,
            shared_experts=0,
            parameters=3_146_240,
            bytes=6 * MIB,
            checkpoint_bytes=6 * MIB,
            dtype="bfloat16",
            quantization=None,
            device="cpu",
            memory_active=14 * MIB,
            memory_limit=8192 * MIB,
            expert_bytes=(EXPERT_BYTES,) * self.layers,
        )
        no = np.zeros(shape, bool)
        heat = HeatView(
            tuple(range(self.layers)), self.experts, {}, ~no, no, no, no, no, samples=0, tokens=0
        )
        nodes = (HistoryNode(0, None, "load demo", STATES[0], 0),)
        self._view = replace(
            self._view,
            state=STATES[0],
            model=report,
            heat=heat,
            history=HistoryReport(nodes, 0, 0, 512 * MIB),
            memory_active=14 * MIB,
            memory_limit=8192 * MIB,
        )
        yield report

    def _do_collect(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        heat = self._view.heat
        assert heat is not None
        full = surface(self.layers, self.experts)
        for done in (8, 16, 24, 32):
            freq = np.round(full * done * 20).astype(np.int64)
            yield RoutingFrame(job, freq, full * done * 0.75, done, done * 120)
            yield Progress(job, "collect", done, 32, "samples", done / 4)
        freq = np.round(full * 640).astype(np.int64)
        freq[0, 3] = 0
        metrics = {"freq": freq.astype(float), "reap": full, "reap_sum": full * 24}
        self._view = replace(
            self._view, heat=replace(heat, metrics=metrics, samples=32, tokens=3840)
        )
        yield CollectReport(
            dataset="demo:mixed",
            samples=32,
            samples_planned=32,
            tokens=3840,
            tokens_per_second=480.0,
            coverage=0.99,
            unseen=((0, 3),),
            suggested_samples=64,
            held_out=4,
            cancelled=False,
        )

    def _do_prune(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield self._stage(int(args[args.index("--n-prune") + 1]))

    def _stage(self, count: int) -> PlanReport:
        heat = self._view.heat
        assert heat is not None
        order = np.argsort(heat.metrics["reap_sum"], axis=1, kind="stable")
        gone = {layer: tuple(sorted(int(e) for e in order[layer, :count])) for layer in heat.layers}
        condemned = np.zeros((self.layers, self.experts), bool)
        for layer, experts in gone.items():
            condemned[layer, list(experts)] = True
        scores = heat.metrics["reap_sum"]
        plan = PlanReport(
            technique="prune",
            metric="reap_sum",
            strategy="bottom",
            experts_before=self.experts,
            experts_after=self.experts - count,
            kept={
                layer: tuple(e for e in range(self.experts) if e not in gone[layer])
                for layer in heat.layers
            },
            pruned=gone,
            bytes_before=6 * MIB,
            bytes_after=6 * MIB - count * MIB // 4,
            delta_bytes=24_576,
            peak_bytes=20 * MIB,
            mass_lost={
                layer: float(scores[layer, list(gone[layer])].sum() / scores[layer].sum())
                for layer in heat.layers
            },
            state_after=STATES[1],
        )
        self._view = replace(
            self._view,
            plan=plan,
            scores=None,
            live="candidate",
            heat=replace(heat, condemned=condemned),
        )
        return plan

    def _do_preview(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield Progress(job, "evaluate", 8, 16, "batches", 2.0)
        report = EvaluateReport(
            subject="staged",
            measured_state=STATES[1],
            datasets=("held-out",),
            perplexity={"held-out": 14.62, "all": 14.62},
            interval={"held-out": (13.9, 15.4), "all": (13.9, 15.4)},
            baseline={"held-out": 14.11, "all": 14.11},
            tokens=2048,
            tokens_per_set={"held-out": 2048},
            kl_mean=0.0312,
            kl_p99=0.41,
            top1_agreement=0.941,
            vs_current=None,
            samples=(),
            steered=False,
        )
        self._view = replace(self._view, scores=report)
        yield report

    def _do_chat(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        if args == ["--new"]:
            yield TextReport("a new conversation begins")
            return
        pieces = ["An", " expert", " is", " a", " small", " network", "."]
        for index, piece in enumerate(pieces):
            yield Token(job, self._view.live, index, index, piece, *self._routed(index))
        text = "".join(pieces)
        back = int(self._option(args, "--back") or 0)
        taken, self._asked = (
            (self._asked[-back:], self._asked[:-back]) if back else ([], self._asked)
        )
        prompt = taken[0] if args[-2:-1] == ["--back"] else args[-1]
        self._asked.append(prompt)
        yield ChatReport(prompt, text, self._view.live, 12, 0, 7, 35.0, "stop")

    def _do_why(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        layer, expert = (int(part) for part in args[0].split(":"))
        yield WhyReport(
            layer, expert, "kept", {"reap_sum": 1.5}, {"reap_sum": 3}, 16, "rank 3 of 16"
        )

    def _do_flip(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        live = "base" if self._view.live == "candidate" else "candidate"
        self._view = replace(self._view, live=live)
        yield self._stepped("flip", 0)

    def _do_discard(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        self._unstage()
        yield self._stepped("discard", 0)

    def _do_apply(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        heat, plan, history = self._view.heat, self._view.plan, self._view.history
        assert heat is not None
        assert plan is not None
        assert history is not None
        alive = heat.alive & ~heat.condemned
        scores = {"perplexity": 14.62} if self._view.scores else {}
        node = HistoryNode(1, 0, "prune --n-prune 4", STATES[1], 24_576, scores)
        self._unstage()
        self._view = replace(
            self._view,
            state=STATES[1],
            heat=replace(heat, alive=alive, condemned=np.zeros_like(alive)),
            history=HistoryReport((history.nodes[0], node), 1, 24_576, 512 * MIB),
        )
        yield self._stepped("apply", 1)

    def _do_undo(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield self._at(0, "undo")

    def _do_redo(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield self._at(1, "redo")

    def _do_goto(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield self._at(int(args[0]), "goto")

    def _do_save(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        yield Progress(job, "writing", 1, 2, "shards", 0.5)
        yield SaveReport(args[0], 6 * MIB, ("model.safetensors",), 16, None, {"load": "ok"})

    def _at(self, node: int, action: str) -> StepReport:
        heat, history = self._view.heat, self._view.history
        assert heat is not None
        assert history is not None
        alive = np.ones((self.layers, self.experts), bool)
        if node == 1:
            order = np.argsort(heat.metrics["reap_sum"], axis=1, kind="stable")
            np.put_along_axis(alive, order[:, :4], values=False, axis=1)
        self._view = replace(
            self._view,
            state=STATES[node],
            heat=replace(heat, alive=alive),
            history=replace(history, current=node),
        )
        return self._stepped(action, node)

    def _unstage(self) -> None:
        heat = self._view.heat
        assert heat is not None
        self._view = replace(
            self._view,
            plan=None,
            scores=None,
            live="base",
            heat=replace(heat, condemned=np.zeros_like(heat.condemned)),
        )

    def _stepped(self, action: str, node: int) -> StepReport:
        command = "prune --n-prune 4" if node else "load demo"
        return StepReport(
            action, node, command, STATES[0], self._view.state, self._view.live, 24_576, 0.4
        )
