"""What the fake engine answers to the commands of the main job, from load to save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mlxfun.calibration.reports import CollectReport, WhyReport
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.editing.reports import HistoryNode, HistoryReport, PlanReport, StepReport
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import (
    Event,
    Progress,
    RoutingFrame,
    Token,
)
from mlxfun.generation.reports import ChatReport, TokensReport
from mlxfun.memory.plan.report import LocalModel, ModelsReport
from mlxfun.report import Report, TextReport
from mlxfun.session.reports import HeatView, InfoReport, SessionView
from tests.fake_selection import EXPERT_BYTES, MIB

STATES = {0: "a1b2c3d4", 1: "e5f60718"}


def surface(layers: int, experts: int, phase: float = 0.0) -> np.ndarray:
    """A smooth fixed landscape in (0, 1], shape [layers, experts]."""
    rows = np.arange(layers)[:, None]
    columns = np.arange(experts)[None, :]
    return 0.5 + 0.5 * np.sin(columns * 0.55 + rows * 0.8 + phase)


class FakeSession:
    """A part of `FakeEngine`: each `_do_...` yields the events of a command, its report last."""

    layers: int
    experts: int
    _view: SessionView
    _asked: list[str]

    def _do_load(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        if not args:
            yield ModelsReport(
                (
                    LocalModel("demo", "included", 6 * MIB, "whole", ""),
                    LocalModel("/models/large one", "recent", 90 * 1024 * MIB, "partly", ""),
                    LocalModel("org/broken", "Hub cache", 0, None, "its headers cannot be read"),
                ),
                8 * 1024 * MIB,
            )
            return
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
            subject="candidate",
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

    def _do_tokens(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        count = len(args[-1].split())
        yield TokensReport(count, 0, count + 5, 512)

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
