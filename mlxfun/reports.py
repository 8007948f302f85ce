"""What commands return: frozen data that a person's and a program's renderers both read.

Every report has `kind` (its name), `summary()` (one sentence) and `data()` (JSON-able).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from mlxfun.events import Array
    from mlxfun.options import MapInForce


def plain(value: Any) -> Any:
    """`value` with dataclasses, tuples, NumPy values and non-string keys made JSON-able."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return value


def readable_bytes(count: int | float) -> str:
    """`count` bytes in powers of 1024: 0 B, 1.5 KiB, 6.1 MiB."""
    size, sign = abs(float(count)), "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.1f} TiB"


def counted(count: int, one: str, more: str) -> str:
    """`count` with its words: 1 expert goes, 4 experts go."""
    return f"{count:,} {one if count == 1 else more}"


@dataclass(frozen=True, slots=True)
class Report:
    """Base class."""

    kind: ClassVar[str] = "report"

    def summary(self) -> str:
        """One sentence for a status line."""
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class TextReport(Report):
    """A command whose whole result is a sentence or a page of text."""

    kind: ClassVar[str] = "text"
    text: str

    def summary(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class InfoReport(Report):
    """The resident model. bytes: parameters as resident; experts: as in the checkpoint.

    expert_bytes: per MoE layer, of one as saved. open_groups: how many groups a token uses.
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

    def summary(self) -> str:
        return (
            f"{self.model_type}: {self.moe_layers} MoE layers x {self.experts_kept} experts, "
            f"top-{self.top_k}, {self.parameters:,} parameters, {readable_bytes(self.bytes)}"
        )


@dataclass(frozen=True, slots=True)
class CollectReport(Report):
    """A calibration run. coverage: share of (layer, expert) pairs seen; unseen lists the rest.

    steering_off: the steering in force was left out.
    """

    kind: ClassVar[str] = "collect"
    dataset: str
    samples: int
    samples_planned: int
    tokens: int
    tokens_per_second: float
    coverage: float
    unseen: tuple[tuple[int, int], ...]
    suggested_samples: int | None
    held_out: int
    cancelled: bool
    steering_off: bool = False

    def summary(self) -> str:
        text = (
            f"{counted(self.samples, 'sample', 'samples')}, "
            f"{counted(self.tokens, 'token', 'tokens')} at {self.tokens_per_second:,.0f} "
            f"tokens/s; {self.coverage:.1%} of the experts seen"
        )
        if self.cancelled:
            text = f"cancelled after {self.samples} of {self.samples_planned} samples: {text}"
        if self.unseen and self.suggested_samples:
            text += f"; {len(self.unseen)} never seen, try {self.suggested_samples} samples"
        if self.steering_off:
            text += "; steering was off while calibrating (chat counts with it: `stats count on`)"
        return text


@dataclass(frozen=True, slots=True)
class StatsReport(Report):
    """The statistics in hand. steered: some were counted in chat while steering was in force."""

    kind: ClassVar[str] = "stats"
    action: str
    layers: tuple[int, ...]
    experts: int
    samples: int
    tokens: int
    coverage: float
    counting: bool
    state: str
    stale: bool
    path: str | None
    least: tuple[tuple[int, int, float], ...]  # (layer, expert, reap_sum), lowest first
    most: tuple[tuple[int, int, float], ...]
    combined: str = ""  # "sum" or "rank" for a merge of `sources` runs
    sources: int = 1
    steered: bool = False

    def summary(self) -> str:
        where = f" ({self.path})" if self.path else ""
        if self.combined:
            where += f", merged by {self.combined} from {self.sources} runs"
        stale = "; taken on another state of the weights" if self.stale else ""
        stale += "; some of it from steered chat" if self.steered else ""
        return (
            f"stats {self.action}{where}: {counted(self.samples, 'sample', 'samples')}, "
            f"{counted(self.tokens, 'token', 'tokens')}, coverage {self.coverage:.1%}, counting chat {'on' if self.counting else 'off'}{stale}"
        )


@dataclass(frozen=True, slots=True)
class PlanReport(Report):
    """A staged plan. kept and pruned: {decoder layer: experts}.

    bytes_before/after: the model's parameters as they would be saved. mass_lost: per layer, the
    share of the summed metric that goes with the pruned experts (None without statistics).
    peak_bytes: the most memory in use, model included, while it was planned and staged.
    """

    kind: ClassVar[str] = "plan"
    technique: str
    metric: str | None
    strategy: str
    experts_before: int
    experts_after: int
    kept: dict[int, tuple[int, ...]]
    pruned: dict[int, tuple[int, ...]]
    bytes_before: int
    bytes_after: int
    delta_bytes: int
    mass_lost: dict[int, float] | None
    state_after: str
    warnings: tuple[str, ...] = ()
    peak_bytes: int = 0

    @property
    def left(self) -> str:
        """How many experts a layer keeps: "12", or "11 to 12" where layers differ, as they may when
        picked by hand or for a global budget."""
        each = [len(experts) for experts in self.kept.values()] or [self.experts_after]
        least, most = min(each), max(each)
        return str(most) if least == most else f"{least} to {most}"

    def summary(self) -> str:
        gone = counted(sum(map(len, self.pruned.values())), "expert goes", "experts go")
        size = f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}"
        each = f"{self.experts_before} -> {self.left} a layer"
        return f"staged {self.technique}: {gone} ({each}), {size}"


@dataclass(frozen=True, slots=True)
class SteerReport(Report):
    """Steering in force. *_value: what the additive rule adds. levels: faders. maps: of scans."""

    kind: ClassVar[str] = "steer"
    activated: dict[int, tuple[int, ...]]
    deactivated: dict[int, tuple[int, ...]]
    notices: tuple[str, ...] = ()
    rule: str = "steermoe"
    boost_value: float = 0.0
    mask_value: float = 0.0
    levels: dict[int, dict[int, float]] = field(default_factory=dict)
    maps: tuple[MapInForce, ...] = ()

    def summary(self) -> str:
        up, down = (sum(map(len, s.values())) for s in (self.activated, self.deactivated))
        if not (up or down or self.levels):
            return "no steering"
        on = f", {sum(map(len, self.levels.values()))} on a level" if self.levels else ""
        text = f"steering: {up} activated, {down} deactivated{on}"
        if self.rule == "additive":
            text += f", adding {self.boost_value:+g} and {self.mask_value:+g}"
        return text


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with the greedy answer of the subject."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class EvaluateReport(Report):
    """Measurements of `subject` ("current" or "staged").

    perplexity: per data set and "all"; interval: 95 % confidence interval of each. kl_* and
    top1_agreement compare token distributions with the checkpoint (mean over tokens of
    KL(checkpoint || subject) in nats; p99 over tokens); vs_current holds the same three against
    the committed state. baseline: the checkpoint's perplexity on the same tokens. steered: steering
    was in force on the subject, as it never is on the checkpoint.
    """

    kind: ClassVar[str] = "evaluate"
    subject: str
    measured_state: str
    datasets: tuple[str, ...]
    perplexity: dict[str, float]
    interval: dict[str, tuple[float, float]]
    baseline: dict[str, float]
    tokens: int
    tokens_per_set: dict[str, int]
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    vs_current: dict[str, float] | None
    samples: tuple[Sample, ...]
    steered: bool
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Perplexity over the checkpoint's on the same tokens."""
        return self.perplexity["all"] / self.baseline["all"]

    def summary(self) -> str:
        low, high = self.interval["all"]
        how = f"{self.subject}, while steering" if self.steered else self.subject
        text = (
            f"{how}: perplexity {self.perplexity['all']:.3f} [{low:.3f}, {high:.3f}] "
            f"({self.ratio:.3f}x the checkpoint) over {self.tokens:,} tokens"
        )
        if self.kl_mean is not None:
            text += f", KL {self.kl_mean:.4f}, top-1 agreement {self.top1_agreement:.1%}"
        return text


@dataclass(frozen=True, slots=True)
class ChatReport(Report):
    """One answer."""

    kind: ClassVar[str] = "chat"
    prompt: str
    text: str
    side: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float
    finish_reason: str  # "stop", "length" or "cancelled"

    def summary(self) -> str:
        rate = f"{self.tokens_per_second:.1f} tokens/s"
        made = counted(self.generated_tokens, "token", "tokens")
        return f"{made} at {rate} ({self.finish_reason})"


@dataclass(frozen=True, slots=True)
class StepReport(Report):
    """apply, discard, flip, compact, undo, redo, goto: where the model stands now."""

    kind: ClassVar[str] = "step"
    action: str
    node: int
    command: str
    state_before: str
    state_after: str
    live: str  # "base" or "candidate"
    bytes_held: int
    milliseconds: float
    bytes_freed: int = 0

    def summary(self) -> str:
        return (
            f"{self.action}: {self.command} (node {self.node}, state {self.state_after}, "
            f"{self.milliseconds:.1f} ms)"
        )


@dataclass(frozen=True, slots=True)
class HistoryNode:
    """One state of the model. bytes: tensors its edit made and holds; label: its given name."""

    id: int
    parent: int | None
    command: str
    state: str
    bytes: int
    scores: dict[str, float] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, slots=True)
class HistoryReport(Report):
    """The tree of states; `current` is the node the model is at."""

    kind: ClassVar[str] = "history"
    nodes: tuple[HistoryNode, ...]
    current: int
    bytes_held: int
    budget: int | None

    def summary(self) -> str:
        limit = f" of {readable_bytes(self.budget)}" if self.budget is not None else ""
        return (
            f"{counted(len(self.nodes), 'node', 'nodes')}, at node {self.current}, "
            f"{readable_bytes(self.bytes_held)}{limit} held"
        )


@dataclass(frozen=True, slots=True)
class SaveReport(Report):
    """A saved model. gate: {check: outcome}, each outcome a word or a sentence."""

    kind: ClassVar[str] = "save"
    path: str
    bytes: int
    files: tuple[str, ...]
    experts: int
    quantization: str | None
    gate: dict[str, str]

    def summary(self) -> str:
        checks = ", ".join(f"{k} {v}" for k, v in self.gate.items())
        return f"saved {self.path} ({readable_bytes(self.bytes)}); {checks}"


@dataclass(frozen=True, slots=True)
class WhyReport(Report):
    """The numbers behind one expert. ranks: 1 is the highest of its layer."""

    kind: ClassVar[str] = "why"
    layer: int
    expert: int
    status: str  # "kept", "pruned", "staged to go", "protected", ...
    scores: dict[str, float]
    ranks: dict[str, int]
    of: int
    verdict: str

    def summary(self) -> str:
        return f"L{self.layer}:E{self.expert} {self.status}: {self.verdict}"


@dataclass(frozen=True, slots=True)
class SmokeReport(Report):
    """smoke-test: {check: outcome}; `passed` when every outcome is "ok"."""

    kind: ClassVar[str] = "smoke-test"
    passed: bool
    checks: dict[str, str]
    text: str

    def summary(self) -> str:
        return f"smoke test {'passed' if self.passed else 'FAILED'}: " + ", ".join(
            f"{k} {v}" for k, v in self.checks.items()
        )


@dataclass(frozen=True, slots=True)
class HeatView:
    """Everything a heatmap draws. Arrays are float64 or bool [L, E]; metrics may be empty."""

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


@dataclass(frozen=True, slots=True)
class SessionView:
    """The session at one moment, for any front end: immutable, cheap to make after each job."""

    state: str = ""
    live: str = "base"
    model: InfoReport | None = None
    heat: HeatView | None = None
    plan: PlanReport | None = None
    scores: EvaluateReport | None = None  # the staged plan's preview
    history: HistoryReport | None = None
    steering: SteerReport | None = None
    counting: bool = False
    memory_active: int = 0
    memory_limit: int | None = None
