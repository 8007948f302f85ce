"""A session without MLX: three MoE layers of eight experts, deterministic, in microseconds.

It keeps the rules that front ends depend on (what needs what, what changes the state) and makes up
the numbers.
"""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from mlxfun.calibration.reports import CollectReport, StatsReport, WhyReport
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.data.scan_reports import Identity
from mlxfun.editing.reports import HistoryNode, HistoryReport, StepReport, WrittenReport
from mlxfun.errors import DatasetError, PlanError, SaveError, StateError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.events import RoutingFrame
from mlxfun.session.reports import (
    HeatView,
    InfoReport,
    LayerRow,
    LayersReport,
    SessionView,
    SmokeReport,
)
from mlxfun.techniques.prune.options import PruneOptions
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_chat import ChatStub
from tests.commands.stub_edits import EditsStub
from tests.commands.stub_looking import LookingStub
from tests.commands.stub_residency import ResidencyStub
from tests.commands.stub_selection import SelectionStub
from tests.commands.stub_state import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K


class StubSession(SelectionStub, EditsStub, ChatStub, ResidencyStub, LookingStub):
    """See `mlxfun.session.session.Session`. `gate` (if given) holds each collected sample until set."""

    @property
    def checkpoint_id(self) -> str:
        return f"checkpoint-of-{Path(self.source).name}"

    @as_in_session
    def recognises(self, given: Given) -> bool:
        return bool(given.checkpoint == f"earlier-{self.checkpoint_id}")

    @as_in_session
    def known(self, given: Given) -> Identity:
        return given.made_on

    @as_in_session
    def earlier_state(self, given: Given) -> str:
        return f"earlier-{given.state}"

    @as_in_session
    def view(self, given: Given) -> SessionView:
        heat = HeatView(
            layers=LAYERS,
            experts=EXPERTS,
            metrics={},
            alive=np.array([[e not in self.gone for e in range(EXPERTS)]] * len(LAYERS)),
            condemned=np.zeros((3, EXPERTS), bool),
            activated=np.zeros((3, EXPERTS), bool),
            deactivated=np.zeros((3, EXPERTS), bool),
            protected=np.zeros((3, EXPERTS), bool),
            samples=self.samples,
            tokens=self.samples * 10,
        )
        return SessionView(
            state=self.state,
            live=self.live,
            model=self.info(),
            heat=heat,
            plan=self.plan,
            scores=self.scores,
            history=self.history(),
            steering=self.steering,
            counting=self.counting,
        )

    @as_in_session
    def info(self, given: Given) -> InfoReport:
        kept = EXPERTS - len(self.gone)
        return InfoReport(
            source=self.source,
            model_id=self.source,
            model_type="stub_moe",
            decoder_layers=6,
            moe_layers=len(LAYERS),
            experts=EXPERTS,
            experts_kept=kept,
            top_k=TOP_K,
            router="softmax",
            groups=1,
            shared_experts=0,
            parameters=24_000,
            bytes=kept * len(LAYERS) * EXPERT_BYTES,
            checkpoint_bytes=EXPERTS * len(LAYERS) * EXPERT_BYTES,
            dtype="float32",
            quantization=None,
            device="stub",
            memory_active=0,
            memory_limit=None,
            digest="d1" * 8 if given.verify else None,
            compactable=bool(self.gone) and not self.compacted,
        )

    @as_in_session
    def layers(self, given: Given) -> LayersReport:
        rows = tuple(
            LayerRow(
                n, p, "linear", "softmax", EXPERTS, EXPERTS - len(self.gone), TOP_K, 1, 1, 0, False,
                f"model.layers.{n}.mlp",
            )
            for p, n in enumerate(LAYERS)
        )  # fmt: skip
        return LayersReport("num_experts", rows)

    @as_in_session
    def collect(self, given: Given) -> CollectReport:
        source = given.options.data.source
        if not source.startswith("demo:") and not Path(source).exists():
            raise DatasetError(f"{source} does not exist: give a JSONL file or demo:NAME")
        planned = given.options.data.max_samples or 6
        done, cancelled = 0, False
        for done in range(1, planned + 1):
            given.ctx.progress("collect", done, planned, "samples")
            given.ctx.emit(
                RoutingFrame(0, np.full((3, 8), done), np.full((3, 8), 0.5), done, done * 10)
            )
            while self.gate is not None and not self.gate.wait(0.005):
                if getattr(given.ctx, "cancelled", threading.Event()).is_set():
                    cancelled = True
                    break
            if cancelled:
                break
        self.samples = done + (self.samples if given.options.add else 0)
        return CollectReport(
            source, done, planned, done * 10, 1000.0, 0.75, ((1, 7),), 64, 1, cancelled
        )

    @as_in_session
    def stats(self, given: Given) -> StatsReport:
        if not self.samples and given.action == "show":
            raise StateError("there are no statistics: run collect first")
        return StatsReport(
            given.action, LAYERS, EXPERTS, self.samples, self.samples * 10, 0.75, self.counting,
            self.state, False, None, ((1, 0, 0.1),), ((1, 7, 0.9),),
        )  # fmt: skip

    @as_in_session
    def save_stats(self, given: Given) -> StatsReport:
        given.path.write_text(str(self.samples))
        return self.stats("save")

    @as_in_session
    def load_stats(self, given: Given) -> StatsReport:
        if not given.path.is_file():
            raise DatasetError(
                f"{given.path} does not exist: give an .npz file that stats save wrote"
            )
        self.samples = int(given.path.read_text())
        return self.stats("load")

    @as_in_session
    def reset_stats(self, given: Given) -> StatsReport:
        self.samples = 0
        return self.stats("reset")

    @as_in_session
    def set_counting(self, given: Given) -> StatsReport:
        self.counting, self.auto_save = given.on, given.auto_save
        return self.stats("count")

    def _step(self, action: str, before: str) -> StepReport:
        node = self.nodes[self.current]
        return StepReport(action, node.id, node.command, before, self.state, self.live, 12, 0.1)

    @as_in_session
    def apply(self, given: Given) -> StepReport:
        plan, before = self._staged(), self.state
        if given.options.max_kl is not None:
            scores = self.scores or self.preview(EvaluateOptions())
            if scores.kl_mean is not None and scores.kl_mean > given.options.max_kl:
                raise StateError(
                    f"mean KL {scores.kl_mean} is above --max-kl {given.options.max_kl}"
                )
        gone = tuple(sorted({*self.gone, *next(iter(plan.pruned.values()))}))
        node = HistoryNode(len(self.nodes), self.current, self.command, plan.state_after, 12)
        self.nodes.append(node)
        self.dropped[node.id] = gone
        self.current = node.id
        self._drop_plan()
        return self._step("apply", before)

    @as_in_session
    def traffic_stats(self, given: Given) -> object:
        raise StateError("the stub serves nobody")

    @as_in_session
    def discard(self, given: Given) -> StepReport:
        self._staged()
        self._drop_plan()
        return self._step("discard", self.state)

    @as_in_session
    def flip(self, given: Given) -> StepReport:
        self._staged()
        self.live = given.side or ("base" if self.live == "candidate" else "candidate")
        return self._step("flip", self.state)

    @as_in_session
    def compact(self, given: Given) -> StepReport:
        if not self.gone or self.compacted:
            raise StateError("nothing to compact: no applied prune")
        self.compacted = True
        return self._step("compact", self.state)

    @as_in_session
    def undo(self, given: Given) -> StepReport:
        parent = self.nodes[self.current].parent
        if parent is None:
            raise StateError("nothing to undo: this is the model as loaded")
        return self._move("undo", parent)

    @as_in_session
    def redo(self, given: Given) -> StepReport:
        children = [n.id for n in self.nodes if n.parent == self.current]
        if not children:
            raise StateError("nothing to redo")
        return self._move("redo", children[-1])

    @as_in_session
    def goto(self, given: Given) -> StepReport:
        if not 0 <= given.node < len(self.nodes):
            raise StateError(f"there is no node {given.node}: choose 0 to {len(self.nodes) - 1}")
        return self._move("goto", given.node)

    def _move(self, action: str, node: int) -> StepReport:
        before = self.state
        self.current = node
        self._drop_plan()
        return self._step(action, before)

    @as_in_session
    def history(self, given: Given) -> HistoryReport:
        return HistoryReport(tuple(self.nodes), self.current, 12, None)

    @as_in_session
    def save(self, given: Given) -> SaveReport:
        if given.options.path.exists() and not given.options.force:
            raise SaveError(f"{given.options.path} exists: choose another name or add --force")
        given.options.path.mkdir(parents=True, exist_ok=True)
        (given.options.path / "config.json").write_text("{}")
        return SaveReport(
            str(given.options.path), 1234, ("config.json",), 4, None, {"load": "ok", "bytes": "ok"}
        )

    @as_in_session
    def write_edit(self, given: Given) -> WrittenReport:
        before = self.plan, self.scores, self.live, self.samples
        self.samples = 1
        plan = self.prune(PruneOptions(n_prune=0), given.ctx)
        self.plan, self.scores, self.live, self.samples = before
        saved = self.save(given.to)
        common = {f.name: getattr(saved, f.name) for f in fields(saved)}
        common["notices"] = (f"recipe: {self.command}",)
        return WrittenReport(**common, plan=replace(plan, straight=True))

    @as_in_session
    def smoke_test(self, given: Given) -> SmokeReport:
        return SmokeReport(True, {"logits": "ok"}, "hello")

    @as_in_session
    def why(self, given: Given) -> WhyReport:
        if given.layer not in LAYERS or not 0 <= given.expert < EXPERTS:
            raise PlanError(f"there is no given.expert {given.layer}:{given.expert}")
        return WhyReport(
            given.layer, given.expert, "kept", {"freq": 3.0}, {"freq": 1}, EXPERTS, "it is used"
        )

    @as_in_session
    def close(self, given: Given) -> None:
        self.closed = True
