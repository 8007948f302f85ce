"""Reports on the resident model, and the snapshot that front ends draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from mlxfun.arrays import Array
from mlxfun.editing.reports import HistoryReport, PlanReport
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.events import Side
from mlxfun.report import Report
from mlxfun.steering.reports import SteerReport
from mlxfun.text import counted, readable_bytes

if TYPE_CHECKING:
    from mlxfun.model.anatomy.facts import Scoring


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One MoE layer as anatomy found it. layer: decoder index; position: 0..L-1."""

    layer: int
    position: int
    router: str
    score: Scoring
    experts: int
    kept: int
    top_k: int
    groups: int
    groups_kept: int
    shared_experts: int
    selection_bias: bool
    path: str


FeedForward = Literal["dense", "experts", "experts + dense", ""]
"""What the feed-forward part of a decoder layer is made of, "" where it only mixes tokens."""


@dataclass(frozen=True, slots=True)
class DecoderRow:
    """One decoder layer, MoE or not. bytes: of its parameters as saved.

    mixer: "attention", "linear attention", "state space", ... of two side by side both.
    """

    layer: int
    mixer: str
    feed_forward: FeedForward
    bytes: int
    path: str


@dataclass(frozen=True, slots=True)
class LayersReport(Report):
    """The MoE layers (rows), and all decoder layers. config_key: of the expert count, "" without."""

    kind: ClassVar[str] = "layers"
    config_key: str
    rows: tuple[LayerRow, ...]
    decoder: tuple[DecoderRow, ...] = ()

    def summary(self) -> str:
        if not self.rows:
            return f"{counted(len(self.decoder), 'decoder layer', 'decoder layers')}, no experts"
        return f"{len(self.rows)} MoE layers; the expert count is config key {self.config_key}"


@dataclass(frozen=True, slots=True)
class InfoReport(Report):
    """The resident model. bytes: parameters as resident; experts: as in the checkpoint.

    expert_bytes: per MoE layer, of one as saved. open_groups: how many groups a token uses.
    compactable: pruned experts are still held in memory. A dense model has 0 MoE layers and
    experts, and no router (""). chat_template: where that is from, "" for none.
    """

    kind: ClassVar[str] = "info"
    source: str
    model_id: str
    model_type: str
    decoder_layers: int
    moe_layers: int
    experts: int
    experts_kept: int
    top_k: int
    router: str
    groups: int
    shared_experts: int
    parameters: int
    bytes: int
    checkpoint_bytes: int
    dtype: str
    quantization: str | None
    device: str
    memory_active: int
    memory_limit: int | None
    notes: tuple[str, ...] = ()
    digest: str | None = None
    expert_bytes: tuple[int, ...] = ()
    open_groups: int = 1
    compactable: bool = False
    chat_template: str = ""

    def summary(self) -> str:
        if not self.moe_layers:
            layers = counted(self.decoder_layers, "decoder layer", "decoder layers")
            return (
                f"{self.model_type}: {layers}, no experts, {self.parameters:,} parameters, "
                f"{readable_bytes(self.bytes)}"
            )
        return (
            f"{self.model_type}: {self.moe_layers} MoE layers x {self.experts_kept} experts, "
            f"top-{self.top_k}, {self.parameters:,} parameters, {readable_bytes(self.bytes)}"
        )


@dataclass(frozen=True, slots=True)
class SmokeReport(Report):
    """smoke-test: {check: outcome}; `passed` when every outcome is "ok". advice: where NaN or
    infinity is in the weights, and what to do."""

    kind: ClassVar[str] = "smoke-test"
    passed: bool
    checks: dict[str, str]
    text: str
    advice: str = ""

    def summary(self) -> str:
        return f"smoke test {'passed' if self.passed else 'FAILED'}: " + ", ".join(
            f"{k} {v}" for k, v in self.checks.items()
        )


@dataclass(frozen=True, slots=True)
class HeatView:
    """Everything a heatmap draws. Arrays are float64 or bool [L, E]; metrics may be empty.

    stale: the metrics were measured on another state of the weights than the committed one. held:
    int8 [L, E], where experts are (see mlxfun.events.ON_DISK), None where all are in memory.
    topics: {(decoder layer, expert): what it serves, in a word or two}.
    """

    layers: tuple[int, ...]
    experts: int
    metrics: dict[str, Array]
    alive: Array
    condemned: Array
    activated: Array
    deactivated: Array
    protected: Array
    samples: int
    tokens: int
    stale: bool = False
    held: Array | None = None
    topics: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionView:
    """The session at one moment, for any front end: immutable, cheap to make after each job."""

    state: str = ""
    live: Side = "base"
    model: InfoReport | None = None
    heat: HeatView | None = None
    plan: PlanReport | None = None
    scores: EvaluateReport | None = None  # the staged plan's preview
    history: HistoryReport | None = None
    steering: SteerReport | None = None
    steered: str = ""  # identity of the steering in force, "" for none
    counting: bool = False
    serving: str = ""  # where a server listens beside the front end, "" for none
    memory_active: int = 0
    memory_limit: int | None = None
