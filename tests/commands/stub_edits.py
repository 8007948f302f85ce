"""The part of the stub session that stages plans, and measures them."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from dataclasses import replace

from mlxfun.checkpoint.bits_plan import BitsPlan
from mlxfun.context import SILENT
from mlxfun.editing.reports import PlanReport
from mlxfun.errors import PlanError, StateError
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.evaluation.reports import EvaluateReport, RefusalCount, RefusalReport
from mlxfun.evaluation.task_options import TaskReport, TaskRow
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.ablate.reports import AblationReport, FrontPoint
from mlxfun.techniques.bits.reports import BitsReport, BitsRow, Uniform
from mlxfun.techniques.distil.reports import DistilReport, Judged, Measured
from mlxfun.techniques.narrow.reports import NarrowReport
from mlxfun.techniques.prune.options import PruneOptions
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_state import EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, StubState


class EditsStub(StubState):
    """Plans, steering and measurements."""

    @as_in_session
    def prune(self, given: Given) -> PlanReport:
        if not self.samples and given.options.expert_list is None:
            raise StateError("there are no statistics: run collect first, or give --expert-list")
        count = given.options.n_prune or 0
        alive = [e for e in range(EXPERTS) if e not in self.gone]
        if count > len(alive) - TOP_K:
            raise PlanError(
                f"--n-prune {count} leaves fewer than top-{TOP_K}: at most {len(alive) - TOP_K}"
            )
        drop = tuple(e for e in alive if e not in given.options.ignore_experts)[:count]
        kept = tuple(e for e in alive if e not in drop)
        self.plan = PlanReport(
            technique="prune",
            metric=given.options.metric,
            strategy=given.options.strategy,
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

    @as_in_session
    def merge(self, given: Given) -> PlanReport:
        had, self.samples = self.samples, 1  # a merge needs no statistics
        plan = self.prune(
            PruneOptions(n_prune=given.options.n_prune, metric=given.options.metric), given.ctx
        )
        self.samples = had
        self.plan = replace(plan, technique="merge", strategy="gated, hungarian", mass_lost=None)
        return self.plan

    @as_in_session
    def narrow(self, given: Given) -> NarrowReport:
        had, self.samples = self.samples, 1
        plan = self.prune(PruneOptions(n_prune=0), given.ctx)
        self.samples = had
        fields = {f.name: getattr(plan, f.name) for f in dataclass_fields(plan)}
        fields |= {"technique": "narrow", "pruned": {}, "mass_lost": None}
        errors = dict.fromkeys(LAYERS, 0.0625)
        found = NarrowReport(
            **fields, width_before=32, width=24, errors=errors, scarce={LAYERS[0]: (1,)}
        )
        self.plan = found
        return found

    @as_in_session
    def tasks(self, given: Given) -> TaskReport:
        row = TaskRow(given.options.names[0], "acc", 0.5, 0.0625, given.options.limit or 8)
        return TaskReport(
            state=self.state, side="current", rows=(row,), limit=given.options.limit,
            version="0.4", seconds=1.0,
        )  # fmt: skip

    @as_in_session
    def bits(self, given: Given) -> tuple[BitsPlan, BitsReport]:
        plan = BitsPlan(self.state, given.options.group_size, {"layers.0.mlp": 4}, 900, 0.125)
        report = BitsReport(
            state=self.state, bytes_before=3000, bytes=900, target=given.options.to_bytes,
            expected_kl=0.125, kl_before=0.0, kl_after=0.25, perplexity=9.5, ratio=1.0625, gap=0.0,
            rows=(BitsRow("mlp", 1, 4, 4.0, 4, 900),), uniform=(Uniform(4, 950, 0.5),), fixed=0,
            tokens=64,
        )  # fmt: skip
        return plan, report

    @as_in_session
    def distil(self, given: Given) -> DistilReport:
        had, self.samples = self.samples, 1
        plan = self.prune(PruneOptions(n_prune=0), given.ctx)
        self.samples = had
        fields = {f.name: getattr(plan, f.name) for f in dataclass_fields(plan)}
        fields |= {"technique": "distil", "pruned": {}, "mass_lost": None, "metric": None}
        text = Judged(4, Measured(0.25, 9.5), Measured(0.125, 9.25), 9.0)
        found = DistilReport(
            **fields,
            train=given.options.train,
            held_out=text,
            fitted=text,
            steps=6,
            planned=6,
            best=4,
        )
        self.plan = found
        return found

    @as_in_session
    def abliterate(self, given: Given) -> AblationReport:
        had, self.samples = self.samples, 1
        plan = self.prune(PruneOptions(n_prune=0), given.ctx)
        self.samples = had
        fields = {f.name: getattr(plan, f.name) for f in dataclass_fields(plan)}
        count = RefusalCount(1, 4, 0, 4)
        fields |= {"technique": "abliterate", "pruned": {}, "mass_lost": None}
        found = AblationReport(
            **fields,
            source_layer=3,
            strengths={"attention": {1: 0.0, 3: 1.5}},
            edited=6,
            refusals=self.refusals(None, given.ctx),
            trials=given.options.search,
            judged="first-token",
            front=(FrontPoint(0, 3, "last", {"attention": 1.5}, 0.2, 0.01, count),),
            chosen=0,
        )
        self.plan = found
        return found

    @as_in_session
    def refusals(self, given: Given) -> RefusalReport:
        subject = ("staged", "current") if self.plan else ("current", "checkpoint")
        before, after = RefusalCount(3, 4, 0, 4), RefusalCount(1, 4, 0, 4)
        example = ("How?", "I can't say.", "Like this.")
        return RefusalReport(*subject, "phrases", before, after, 0.01, 0.02, (example,))

    @as_in_session
    def amplify(self, given: Given) -> PlanReport:
        return self._boosted("amplify", {1: {2: given.options.scale or 0.5}})

    @as_in_session
    def bake(self, given: Given) -> PlanReport:
        return self._boosted("bake", {1: {2: 2.0}})

    def _boosted(self, technique: str, boosts: dict[int, dict[int, float]]) -> PlanReport:
        had, self.samples = self.samples, 1  # a boost needs no statistics
        plan = self.prune(PruneOptions(n_prune=1), SILENT)
        self.samples = had
        self.plan = replace(plan, technique=technique, strategy="selection bias", mass_lost=None)
        return self.plan

    @as_in_session
    def steer(self, given: Given) -> SteerReport:
        if isinstance(given.options, SteerReport):
            self.steering = given.options
            return given.options
        for layer in {**given.options.activate, **given.options.deactivate}:
            if layer not in LAYERS:
                raise PlanError(f"layer {layer} has no experts: choose one of {LAYERS}")
        self.steered = given.options
        self.steering = SteerReport(dict(given.options.activate), dict(given.options.deactivate))
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

    @as_in_session
    def evaluate(self, given: Given) -> EvaluateReport:
        return self._measure("current", len(self.gone), given.options)

    @as_in_session
    def preview(self, given: Given) -> EvaluateReport:
        plan = self._staged()
        self.scores = self._measure("staged", EXPERTS - plan.experts_after, given.options)
        return self.scores
