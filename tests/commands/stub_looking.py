"""The part of the stub session that looks inside the model, and intervenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlxfun.errors import StateError
from mlxfun.steering.reports import StandingView, SteerReport
from mlxfun.tracing import reports
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_state import StubState

TOKENS = ("The", " cat")


class LookingStub(StubState):
    """One value, one head, one share, one vector."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vectors: dict[str, Any] = {}

    @as_in_session
    def trace_values(self, given: Given) -> reports.TraceReport:
        at = given.options.at
        values = tuple(
            reports.TracedValue(name, "model", (1, 2, 4), "float32", 1.0, -1.0, 1.0) for name in at
        )
        return reports.TraceReport(TOKENS, 1, values, ((" sat", 0.5),))

    @as_in_session
    def difference(self, given: Given) -> reports.DifferenceReport:
        rows = ((0, 0.0, None, 0.5, 0.25),)
        return reports.DifferenceReport(
            f"the {given.options.against}", TOKENS, rows, "layers.0.mlp.output", (0.0, 0.5),
            (" sat", " ran"),
        )  # fmt: skip

    @as_in_session
    def lens(self, given: Given) -> reports.LensReport:
        words, chances = (((" sat",), (" on",)),), (((0.5,), (0.25,)),)
        said = "layer 0 says ' on'"
        return reports.LensReport((0,), (0, 1), TOKENS, words, chances, 0, said)

    @as_in_session
    def tune_lens(self, given: Given) -> reports.TunedLensReport:
        given.options.path.write_bytes(b"lens")
        return reports.TunedLensReport(str(given.options.path), ((0, 2.0, 1.0),))

    @as_in_session
    def attention(self, given: Given) -> reports.AttentionReport | reports.HeadsReport:
        if given.options.find is not None:
            return reports.HeadsReport(given.options.find, ((3, 1, 0.75),))
        weights, layer, head = ((1.0, 0.0), (0.25, 0.75)), given.options.layer, given.options.head
        return reports.AttentionReport(layer, head, 4, TOKENS, weights, ((0,), (1, 0)))

    @as_in_session
    def patch(self, given: Given) -> reports.PatchReport:
        o = given.options
        return reports.PatchReport(
            o.method, o.component, o.metric, "position", (0,), TOKENS, ((0.0, None),), 1.0, 0.0,
            " sat", " ran", ((0, 1, " cat", 0.5),), "most at layer 0",
        )  # fmt: skip

    @as_in_session
    def attribute(self, given: Given) -> reports.AttributionReport:
        shares = (("layer 3 expert 7", 2.0), ("embed", -0.5))
        return reports.AttributionReport(" sat", "", 1.5, 0.0, shares, "' sat': +1.50")

    @as_in_session
    def save_activations(self, given: Given) -> reports.ActivationsReport:
        given.options.path.write_bytes(b"rows")
        return reports.ActivationsReport(str(given.options.path), given.options.at, 4, 4096)

    @as_in_session
    def train_probes(self, given: Given) -> reports.ProbesReport:
        return reports.ProbesReport(tuple(given.classes), ((0, 0.75, 0.5),), 0.5, 6, 2)

    @as_in_session
    def train_sae(self, given: Given) -> reports.SaeReport:
        o, training = given.options, given.options.training
        o.path.mkdir()
        found = reports.SaeReport(
            str(o.path), o.at or "layers.3.residual", training.kind, 4, 32, training.k, 96, 2,
            ((48, 1.0), (96, 0.5)), 0.25, 0.125, 2.0, 0.5, 12,
        )  # fmt: skip
        effect = {"plain": 2.0, "spliced": 2.25, "zeros": 3.0, "kl_spliced": 0.25, "kl_zeros": 1.5}
        return found if given.data is None else replace(found, **effect, recovered=0.75)

    @as_in_session
    def sae_features(self, given: Given) -> reports.SaeFeaturesReport:
        example = reports.FeatureExample(3.5, 0, 1, "The", " cat", " sat")
        rows = tuple(
            reports.FeatureRow(n, 0.25, 1.5, (example,)) for n in given.options.features or (7,)
        )
        return reports.SaeFeaturesReport(str(given.options.path), "x", 32, 96, 4, 2.0, rows)

    @as_in_session
    def sae_change(self, given: Given) -> tuple[str, Any]:
        o = given.options
        said = f"add_vector({o.strength:g})" if o.level is None else f"clamp_feature({o.level:g})"
        return "layers.3.residual", SimpleNamespace(described=f"{said} of {o.feature}")

    @as_in_session
    def make_vector(self, given: Given) -> reports.VectorsReport:
        row = reports.VectorRow(given.options.name, given.options.method, ((3, 2.0),), ((3, 1.0),),
                                self.state, 4, 4)  # fmt: skip
        self.vectors[row.name] = row
        return reports.VectorsReport((row,))

    @as_in_session
    def list_vectors(self, given: Given) -> reports.VectorsReport:
        return reports.VectorsReport(tuple(self.vectors.values()))

    @as_in_session
    def save_vector(self, given: Given) -> reports.VectorsReport:
        given.path.write_bytes(b"vector")
        return reports.VectorsReport((replace(self.vectors[given.name], path=str(given.path)),))

    @as_in_session
    def load_vector(self, given: Given) -> str:
        path = Path(given.path)
        self.vectors[str(path)] = path
        return str(path)

    @as_in_session
    def vector(self, given: Given) -> tuple[int, Any]:
        if given.name not in self.vectors:
            raise StateError(f"there are no vectors called {given.name!r} in hand")
        return given.layer or 3, [1.0]

    @as_in_session
    def intervene(self, given: Given) -> SteerReport:
        view = StandingView(given.name, given.change.described, given.source, "k")
        self.steering = replace(self.steering, interventions=(view,))
        return self.steering

    @as_in_session
    def clear_interventions(self, given: Given) -> SteerReport:
        self.steering = replace(self.steering, interventions=())
        return self.steering
