"""The part of the stub session that selects, probes and compares."""

from __future__ import annotations

from dataclasses import replace

from mlxfun.calibration.reports import WhyReport
from mlxfun.editing.reports import HistoryReport, PlanReport
from mlxfun.errors import StateError
from mlxfun.evaluation.reports import CompareReport, NodeFigures, ProbeReport
from mlxfun.generation.reports import ABReport, Answer
from mlxfun.scans.reports import DossierReport, Topic, TopicsReport, TopToken
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_state import EXPERT_BYTES, EXPERTS, LAYERS, StubState


class SelectionStub(StubState):
    """Manual selections, probes, and comparing what there is."""

    @as_in_session
    def name_node(self, given: Given) -> HistoryReport:
        self.nodes[given.node] = replace(self.nodes[given.node], label=given.label)
        return HistoryReport(tuple(self.nodes), 0, 0, None)

    @as_in_session
    def compare_nodes(self, given: Given) -> CompareReport:
        a, b = (
            NodeFigures(n, self.nodes[n].command, self.nodes[n].state, 10, 8, 1.0, 12.0 + n, 1.0,
                        0.1 * n, ())
            for n in (given.first, given.second)
        )  # fmt: skip
        names = tuple(data.source for data in given.options.datasets) or ("held-out",)
        return CompareReport(a, b, 100, names, {1: (7,)}, {})

    @as_in_session
    def select(self, given: Given) -> PlanReport:
        pruned = {layer: given.options.drop.get(layer, ()) for layer in LAYERS}
        gone = sum(map(len, pruned.values()))
        self.plan = PlanReport(
            technique="prune",
            metric=given.options.metric,
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

    @as_in_session
    def probe(self, given: Given) -> ProbeReport:
        if self.plan is None:
            raise StateError("nothing is staged to probe; stage a plan first, e.g. with prune")
        given.ctx.check()
        name = given.options.data.source if given.options.data else "held-out"
        return ProbeReport(
            self.plan.state_after, name, given.options.tokens, 13.0, 12.0, 0.02, 0.95
        )

    @as_in_session
    def ab(self, given: Given) -> ABReport:
        if self.plan is None:
            raise StateError("there is nothing to compare")
        one = Answer("base", "current", "a b", ("a", " b"), (1, 2), "stop")
        two = Answer("candidate", "staged plan", "a c", ("a", " c"), (1, 3), "stop")
        return ABReport(given.text, one, two, 1, (0.0, 0.5), given.options.seed)

    @as_in_session
    def topics(self, given: Given) -> TopicsReport:
        return TopicsReport((), EXPERTS)

    @as_in_session
    def find_topics(self, given: Given) -> TopicsReport:
        row = Topic(0, 1, "numbers", "profile", "90% of numbers are routed here", 0.001, "s")
        return TopicsReport((row,), EXPERTS, EXPERTS, "held-out")

    @as_in_session
    def dossier(self, given: Given) -> DossierReport:
        status = "kept", {"freq": 3.0}, {"freq": 1}, EXPERTS, "it is used"
        why = WhyReport(given.layer, given.expert, *status)
        tokens = given.options.tokens
        return DossierReport(why, "held-out", tokens, 4, 0.5, (TopToken("a", 2, 3),), 0, 0.9)
