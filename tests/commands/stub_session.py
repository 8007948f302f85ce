"""A session without MLX: three MoE layers of eight experts, deterministic, in microseconds.

It keeps the rules that front ends depend on (what needs what, what changes the state) and makes up
the numbers.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.reports import CollectReport, StatsReport, WhyReport
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.context import SILENT, Context
from mlxfun.editing.options import ApplyOptions
from mlxfun.editing.reports import HistoryNode, HistoryReport, PlanReport, StepReport
from mlxfun.errors import DatasetError, ModelError, PlanError, SaveError, StateError
from mlxfun.evaluation.options import EvaluateOptions, RefusalOptions
from mlxfun.evaluation.reports import EvaluateReport, RefusalCount, RefusalReport
from mlxfun.events import RoutingFrame, Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ChatReport
from mlxfun.scans.options import ScanOptions
from mlxfun.scans.reports import ScanReport, ScanRow
from mlxfun.session.reports import (
    HeatView,
    InfoReport,
    LayerRow,
    LayersReport,
    SessionView,
    SmokeReport,
)
from mlxfun.steering.options import SteerOptions
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.ablate.reports import AblationReport, FrontPoint
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from tests.commands.stub_hand import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, HandStub


class StubSession(HandStub):
    """See `mlxfun.session.session.Session`. `gate` (if given) holds each collected sample until set."""

    def __init__(self, source: str | Path, seed: int = 0, gate: threading.Event | None = None):
        if str(source) not in ("demo", "other") and not Path(source).is_dir():
            raise ModelError(f"{source} is neither a directory nor a model on the Hub")
        self.source = str(source)
        self.seed = seed
        self.gate = gate
        self.command = ""
        self.threads: set[int] = set()
        self.closed = False
        self.nodes = [HistoryNode(0, None, "load", self._hash(()), 0)]
        self.dropped: dict[int, tuple[int, ...]] = {0: ()}
        self.current = 0
        self.plan: PlanReport | None = None
        self.scores: EvaluateReport | None = None
        self.live = "base"
        self.samples = 0
        self.counting = False
        self.auto_save: Path | None = None
        self.steering = SteerReport({}, {})
        self.steered: SteerOptions | None = None
        self.turns = 0
        self.taken = 0

    def _hash(self, dropped: tuple[int, ...]) -> str:
        return hashlib.blake2b(f"{self.source}{dropped}".encode(), digest_size=6).hexdigest()

    @property
    def state(self) -> str:
        self.threads.add(threading.get_ident())
        return self.nodes[self.current].state

    @property
    def checkpoint_id(self) -> str:
        return f"checkpoint-of-{Path(self.source).name}"

    @property
    def gone(self) -> tuple[int, ...]:
        return self.dropped[self.current]

    def view(self) -> SessionView:
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

    def info(self, verify: bool = False, ctx: Context = SILENT) -> InfoReport:
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
            digest="d1" * 8 if verify else None,
        )

    def layers(self) -> LayersReport:
        rows = tuple(
            LayerRow(
                n, p, "linear", "softmax", EXPERTS, EXPERTS - len(self.gone), TOP_K, 1, 1, 0, False,
                f"model.layers.{n}.mlp",
            )
            for p, n in enumerate(LAYERS)
        )  # fmt: skip
        return LayersReport("num_experts", rows)

    def collect(self, options: CollectOptions, ctx: Context = SILENT) -> CollectReport:
        source = options.data.source
        if not source.startswith("demo:") and not Path(source).exists():
            raise DatasetError(f"{source} does not exist: give a JSONL file or demo:NAME")
        planned = options.data.max_samples or 6
        done, cancelled = 0, False
        for done in range(1, planned + 1):
            ctx.progress("collect", done, planned, "samples")
            ctx.emit(RoutingFrame(0, np.full((3, 8), done), np.full((3, 8), 0.5), done, done * 10))
            while self.gate is not None and not self.gate.wait(0.005):
                if getattr(ctx, "cancelled", threading.Event()).is_set():
                    cancelled = True
                    break
            if cancelled:
                break
        self.samples = done + (self.samples if options.add else 0)
        return CollectReport(
            source, done, planned, done * 10, 1000.0, 0.75, ((1, 7),), 64, 1, cancelled
        )

    def stats(self, action: str = "show") -> StatsReport:
        if not self.samples and action == "show":
            raise StateError("there are no statistics: run collect first")
        return StatsReport(
            action, LAYERS, EXPERTS, self.samples, self.samples * 10, 0.75, self.counting,
            self.state, False, None, ((1, 0, 0.1),), ((1, 7, 0.9),),
        )  # fmt: skip

    def save_stats(self, path: Path) -> StatsReport:
        path.write_text(str(self.samples))
        return self.stats("save")

    def load_stats(self, path: Path) -> StatsReport:
        if not path.is_file():
            raise DatasetError(f"{path} does not exist: give an .npz file that stats save wrote")
        self.samples = int(path.read_text())
        return self.stats("load")

    def reset_stats(self) -> StatsReport:
        self.samples = 0
        return self.stats("reset")

    def set_counting(self, on: bool, auto_save: Path | None = None) -> StatsReport:
        self.counting, self.auto_save = on, auto_save
        return self.stats("count")

    def safety_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        return self._scan("safety", options)

    def domain_scan(self, options: ScanOptions, ctx: Context = SILENT) -> ScanReport:
        return self._scan("domain", options)

    def _scan(self, technique: str, options: ScanOptions) -> ScanReport:
        return ScanReport(
            technique=technique,
            name=options.domain_name or "safety",
            path=str(options.output),
            state=self.state,
            first=options.first.source,
            second=options.second.source,
            samples=(4, 4),
            tokens=(40, 40),
            experts=EXPERTS * len(LAYERS),
            threshold_percentile=options.threshold_percentile,
            alpha=options.alpha,
            more={3: (5,)},
            less={},
            by_percentile=2,
            rows=(ScanRow(3, 5, 1.0, 0.25, 0.125, 0.0001, 1.0, None),),
            notices=("few",),
        )

    def prune(self, options: PruneOptions, ctx: Context = SILENT) -> PlanReport:
        if not self.samples and options.expert_list is None:
            raise StateError("there are no statistics: run collect first, or give --expert-list")
        count = options.n_prune or 0
        alive = [e for e in range(EXPERTS) if e not in self.gone]
        if count > len(alive) - TOP_K:
            raise PlanError(
                f"--n-prune {count} leaves fewer than top-{TOP_K}: at most {len(alive) - TOP_K}"
            )
        drop = tuple(e for e in alive if e not in options.ignore_experts)[:count]
        kept = tuple(e for e in alive if e not in drop)
        self.plan = PlanReport(
            technique="prune",
            metric=options.metric,
            strategy=options.strategy,
            experts_before=len(alive),
            experts_after=len(kept),
            kept=dict.fromkeys(LAYERS, kept),
            pruned=dict.fromkeys(LAYERS, drop),
            bytes_before=len(alive) * 3 * EXPERT_BYTES,
            bytes_after=len(kept) * 3 * EXPERT_BYTES,
            delta_bytes=12,
            mass_lost=dict.fromkeys(LAYERS, 0.125),
            state_after=self._hash(tuple(sorted(self.gone + drop))),
        )
        self.scores, self.live = None, "candidate"
        return self.plan

    def merge(self, options: MergeOptions, ctx: Context = SILENT) -> PlanReport:
        had, self.samples = self.samples, 1  # a merge needs no statistics
        plan = self.prune(PruneOptions(n_prune=options.n_prune, metric=options.metric), ctx)
        self.samples = had
        self.plan = replace(plan, technique="merge", strategy="gated, hungarian", mass_lost=None)
        return self.plan

    def abliterate(self, options: AblateOptions, ctx: Context = SILENT) -> AblationReport:
        had, self.samples = self.samples, 1
        plan = self.prune(PruneOptions(n_prune=0), ctx)
        self.samples = had
        fields = {f.name: getattr(plan, f.name) for f in dataclass_fields(plan)}
        count = RefusalCount(1, 4, 0, 4)
        fields |= {"technique": "abliterate", "pruned": {}, "mass_lost": None}
        found = AblationReport(
            **fields,
            source_layer=3,
            strengths={"attention": {1: 0.0, 3: 1.5}},
            edited=6,
            refusals=self.refusals(None, ctx),
            trials=options.search,
            judged="first-token",
            front=(FrontPoint(0, 3, "last", {"attention": 1.5}, 0.2, 0.01, count),),
            chosen=0,
        )
        self.plan = found
        return found

    def refusals(self, options: RefusalOptions | None, ctx: Context = SILENT) -> RefusalReport:
        subject = ("staged", "current") if self.plan else ("current", "checkpoint")
        before, after = RefusalCount(3, 4, 0, 4), RefusalCount(1, 4, 0, 4)
        example = ("How?", "I can't say.", "Like this.")
        return RefusalReport(*subject, "phrases", before, after, 0.01, 0.02, (example,))

    def amplify(self, options: AmplifyOptions, ctx: Context = SILENT) -> PlanReport:
        return self._boosted("amplify", {1: {2: options.scale}})

    def bake(self, options: BakeOptions, ctx: Context = SILENT) -> PlanReport:
        return self._boosted("bake", {1: {2: 2.0}})

    def _boosted(self, technique: str, boosts: dict[int, dict[int, float]]) -> PlanReport:
        had, self.samples = self.samples, 1  # a boost needs no statistics
        plan = self.prune(PruneOptions(n_prune=1), SILENT)
        self.samples = had
        self.plan = replace(plan, technique=technique, strategy="selection bias", mass_lost=None)
        return self.plan

    def steer(self, options: SteerOptions | SteerReport) -> SteerReport:
        if isinstance(options, SteerReport):
            self.steering = options
            return options
        for layer in {**options.activate, **options.deactivate}:
            if layer not in LAYERS:
                raise PlanError(f"layer {layer} has no experts: choose one of {LAYERS}")
        self.steered = options
        self.steering = SteerReport(dict(options.activate), dict(options.deactivate))
        return self.steering

    def _measure(self, subject: str, gone: int, options: EvaluateOptions) -> EvaluateReport:
        names = tuple(d.source for d in options.datasets) or ("held-out",)
        value = 12.0 + gone
        return EvaluateReport(
            subject=subject,
            measured_state=self.state,
            datasets=names,
            perplexity={**dict.fromkeys(names, value), "all": value},
            interval={
                **dict.fromkeys(names, (value - 1, value + 1)),
                "all": (value - 1, value + 1),
            },
            baseline={**dict.fromkeys(names, 12.0), "all": 12.0},
            tokens=480,
            tokens_per_set=dict.fromkeys(names, 480),
            kl_mean=0.01 * gone if options.kl else None,
            kl_p99=0.1 * gone if options.kl else None,
            top1_agreement=1 - 0.01 * gone if options.kl else None,
            vs_current=None,
            samples=(),
            steered=bool(self.steering.activated or self.steering.deactivated),
        )

    def evaluate(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        return self._measure("current", len(self.gone), options)

    def preview(self, options: EvaluateOptions, ctx: Context = SILENT) -> EvaluateReport:
        plan = self._staged()
        self.scores = self._measure("staged", EXPERTS - plan.experts_after, options)
        return self.scores

    def _staged(self) -> PlanReport:
        if self.plan is None:
            raise StateError("nothing is staged: run prune first")
        return self.plan

    def chat(self, text: str, options: GenerateOptions, ctx: Context = SILENT) -> ChatReport:
        if options.side == "candidate":
            self._staged()
        words = f"turn {self.turns}: {text}".split(" ")
        said, reason = "", "stop"
        for index, word in enumerate(words[: options.max_tokens]):
            piece = word if not index else " " + word
            said += piece
            ctx.emit(Token(0, self.live, index, index, piece))
        self.turns += 1
        return ChatReport(text, said, self.live, 5, 0, len(words), 50.0, reason)

    def take_back(self, count: int) -> str:
        if count > self.turns:
            raise StateError(f"the conversation has {self.turns} questions to take back")
        self.turns -= count
        self.taken = count
        return "what was asked"

    def give_back(self) -> None:
        self.turns += self.taken

    def reset_chat(self) -> None:
        self.turns = 0

    def _step(self, action: str, before: str) -> StepReport:
        node = self.nodes[self.current]
        return StepReport(action, node.id, node.command, before, self.state, self.live, 12, 0.1)

    def apply(self, options: ApplyOptions, ctx: Context = SILENT) -> StepReport:
        plan, before = self._staged(), self.state
        if options.max_kl is not None:
            scores = self.scores or self.preview(EvaluateOptions())
            if scores.kl_mean is not None and scores.kl_mean > options.max_kl:
                raise StateError(f"mean KL {scores.kl_mean} is above --max-kl {options.max_kl}")
        gone = tuple(sorted({*self.gone, *next(iter(plan.pruned.values()))}))
        node = HistoryNode(len(self.nodes), self.current, self.command, plan.state_after, 12)
        self.nodes.append(node)
        self.dropped[node.id] = gone
        self.current = node.id
        self._drop_plan()
        return self._step("apply", before)

    def _drop_plan(self) -> None:
        self.plan, self.scores, self.live = None, None, "base"

    def discard(self) -> StepReport:
        self._staged()
        self._drop_plan()
        return self._step("discard", self.state)

    def flip(self, side: str | None = None) -> StepReport:
        self._staged()
        self.live = side or ("base" if self.live == "candidate" else "candidate")
        return self._step("flip", self.state)

    def compact(self, ctx: Context = SILENT) -> StepReport:
        if not self.gone:
            raise StateError("nothing to compact: no applied prune")
        return self._step("compact", self.state)

    def undo(self) -> StepReport:
        parent = self.nodes[self.current].parent
        if parent is None:
            raise StateError("nothing to undo: this is the model as loaded")
        return self._move("undo", parent)

    def redo(self) -> StepReport:
        children = [n.id for n in self.nodes if n.parent == self.current]
        if not children:
            raise StateError("nothing to redo")
        return self._move("redo", children[-1])

    def goto(self, node: int, ctx: Context = SILENT) -> StepReport:
        if not 0 <= node < len(self.nodes):
            raise StateError(f"there is no node {node}: choose 0 to {len(self.nodes) - 1}")
        return self._move("goto", node)

    def _move(self, action: str, node: int) -> StepReport:
        before = self.state
        self.current = node
        self._drop_plan()
        return self._step(action, before)

    def history(self) -> HistoryReport:
        return HistoryReport(tuple(self.nodes), self.current, 12, None)

    def save(self, options: SaveOptions, ctx: Context = SILENT) -> SaveReport:
        if options.path.exists() and not options.force:
            raise SaveError(f"{options.path} exists: choose another name or add --force")
        options.path.mkdir(parents=True, exist_ok=True)
        (options.path / "config.json").write_text("{}")
        return SaveReport(
            str(options.path), 1234, ("config.json",), 4, None, {"load": "ok", "bytes": "ok"}
        )

    def smoke_test(self, ctx: Context = SILENT) -> SmokeReport:
        return SmokeReport(True, {"logits": "ok"}, "hello")

    def why(self, layer: int, expert: int) -> WhyReport:
        if layer not in LAYERS or not 0 <= expert < EXPERTS:
            raise PlanError(f"there is no expert {layer}:{expert}")
        return WhyReport(layer, expert, "kept", {"freq": 3.0}, {"freq": 1}, EXPERTS, "it is used")

    def close(self) -> None:
        self.closed = True
