"""The part of the stub session that a person's hand uses."""

from __future__ import annotations

from dataclasses import replace

from mlxfun.context import SILENT, Context
from mlxfun.editing.reports import HistoryNode, HistoryReport, PlanReport
from mlxfun.errors import StateError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions
from mlxfun.evaluation.reports import CompareReport, NodeFigures, ProbeReport
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ABReport, Answer
from mlxfun.techniques.prune.options import SelectOptions

LAYERS = (1, 3, 5)
EXPERTS = 8
TOP_K = 2
EXPERT_BYTES = 1000


class HandStub:
    """See `StubSession`, which this is a part of."""

    nodes: list[HistoryNode]

    def name_node(self, node: int, label: str) -> HistoryReport:
        self.nodes[node] = replace(self.nodes[node], label=label)
        return HistoryReport(tuple(self.nodes), 0, 0, None)

    def compare_nodes(
        self, first: int, second: int, options: EvaluateOptions, ctx: Context = SILENT
    ) -> CompareReport:
        a, b = (
            NodeFigures(n, self.nodes[n].command, self.nodes[n].state, 10, 8, 1.0, 12.0 + n, 1.0,
                        0.1 * n, ())
            for n in (first, second)
        )  # fmt: skip
        names = tuple(data.source for data in options.datasets) or ("held-out",)
        return CompareReport(a, b, 100, names, {1: (7,)}, {})

    plan: PlanReport | None
    live: str

    def select(self, options: SelectOptions) -> PlanReport:
        pruned = {layer: options.drop.get(layer, ()) for layer in LAYERS}
        gone = sum(map(len, pruned.values()))
        self.plan = PlanReport(
            technique="prune",
            metric=options.metric,
            strategy="hand",
            experts_before=EXPERTS,
            experts_after=EXPERTS - max(map(len, pruned.values())),
            kept={ly: tuple(e for e in range(EXPERTS) if e not in pruned[ly]) for ly in LAYERS},
            pruned=pruned,
            bytes_before=EXPERTS * 3 * EXPERT_BYTES,
            bytes_after=(EXPERTS * 3 - gone) * EXPERT_BYTES,
            delta_bytes=12,
            mass_lost=None,
            state_after="by hand",
        )
        self.live = "candidate"
        return self.plan

    def probe(self, options: ProbeOptions, ctx: Context = SILENT) -> ProbeReport:
        if self.plan is None:
            raise StateError("nothing is staged to probe; stage a plan first, e.g. with prune")
        ctx.check()
        name = options.data.source if options.data else "held-out"
        return ProbeReport(self.plan.state_after, name, options.tokens, 13.0, 12.0, 0.02, 0.95)

    def ab(self, text: str, options: GenerateOptions, ctx: Context = SILENT) -> ABReport:
        if self.plan is None:
            raise StateError("there is nothing to compare")
        one = Answer("base", "committed model", "a b", ("a", " b"), (1, 2), "stop")
        two = Answer("candidate", "staged plan", "a c", ("a", " c"), (1, 3), "stop")
        return ABReport(text, one, two, 1, (0.0, 0.5), options.seed)
