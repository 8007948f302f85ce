"""Reports of the commands that look inside a model: plain data, nothing heavy imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxfun.report import Report
from mlxfun.tracing.options import ComponentName


@dataclass(frozen=True, slots=True)
class TracedValue:
    """One value of a forward. shape, dtype: of all positions; norm, lowest, highest: at the one
    position asked for, None for whole numbers. experts: chosen ones, of a router's choice."""

    name: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    norm: float | None
    lowest: float | None
    highest: float | None
    experts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TraceReport(Report):
    """Values of one forward. says: the most probable next tokens, (text, probability)."""

    kind: ClassVar[str] = "trace"
    tokens: tuple[str, ...]
    position: int
    values: tuple[TracedValue, ...]
    says: tuple[tuple[str, float], ...]

    def summary(self) -> str:
        word, chance = self.says[0]
        return (
            f"{len(self.values)} values of a forward over {len(self.tokens)} tokens; the model says "
            f"{word!r} ({chance:.0%})"
        )


@dataclass(frozen=True, slots=True)
class DifferenceReport(Report):
    """How the live side differs from another state inside one forward.

    rows: (layer, changes of attention, routes, feed-forward part and residual stream); relative
    sizes, of routes the share that is not chosen any more; None where a layer has no such part.
    first: the first part that differs at all. kl: nats at each position.
    """

    kind: ClassVar[str] = "difference"
    against: str
    tokens: tuple[str, ...]
    rows: tuple[tuple[int, float | None, float | None, float | None, float | None], ...]
    first: str
    kl: tuple[float, ...]
    says: tuple[str, str]

    def summary(self) -> str:
        if not self.first:
            return f"nothing differs from {self.against} on this text, bit for bit"
        before, after = self.says
        said = f"says {after!r}" if before == after else f"says {after!r} instead of {before!r}"
        return (
            f"differs from {self.against} first at {self.first}; KL {self.kl[-1]:.4f} nats at the end, "
            f"{said}"
        )


@dataclass(frozen=True, slots=True)
class LensReport(Report):
    """What each layer would say. words, probabilities: [L][T][k], most probable first.

    ids: [L][T][k], their token ids. first_layer: from which layer on the last position says what the model says, None for none.
    answers: tokens that were followed; answer_ranks, answer_probabilities: [L][T][A].
    """

    kind: ClassVar[str] = "lens"
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    words: tuple[tuple[tuple[str, ...], ...], ...]
    probabilities: tuple[tuple[tuple[float, ...], ...], ...]
    first_layer: int | None
    said: str
    answers: tuple[str, ...] = ()
    answer_ranks: tuple[tuple[tuple[int, ...], ...], ...] = ()
    answer_probabilities: tuple[tuple[tuple[float, ...], ...], ...] = ()
    ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    text: str = ""
    chat: bool = False
    written: str = ""

    def summary(self) -> str:
        return self.said


@dataclass(frozen=True, slots=True)
class TunedLensReport(Report):
    """A tuned lens that was trained: (layer, KL in nats before, after), on held-out samples."""

    kind: ClassVar[str] = "tuned-lens"
    path: str
    rows: tuple[tuple[int, float, float], ...]

    def summary(self) -> str:
        before, after = (sum(row[i] for row in self.rows) / len(self.rows) for i in (1, 2))
        return (
            f"tuned {len(self.rows)} layers: KL to the model {before:.3f} -> {after:.3f} nats on "
            f"held-out samples, written to {self.path}"
        )


@dataclass(frozen=True, slots=True)
class AttentionReport(Report):
    """One head. weights: [T][S]. heads: of the layer. looks: for each token the three positions it
    looks at most."""

    kind: ClassVar[str] = "attention"
    layer: int
    head: int
    heads: int
    tokens: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    looks: tuple[tuple[int, ...], ...]
    text: str = ""
    chat: bool = False
    written: str = ""

    def summary(self) -> str:
        return (
            f"layer {self.layer}, head {self.head} of {self.heads}: attention of "
            f"{len(self.tokens)} tokens"
        )


HEAD_FIGURES = ("on the first token", "on the one before", "on itself", "tokens attended to")


@dataclass(frozen=True, slots=True)
class HeadMapsReport(Report):
    """All heads of a layer. rows: for each the mean weight on the first token, on the one before, on
    its own, and how many tokens it looks at (e to the entropy of its weights). maps: [H][n][n],
    means over parts of the queries of what they give to parts of the keys."""

    kind: ClassVar[str] = "head maps"
    layer: int
    tokens: tuple[str, ...]
    rows: tuple[tuple[float, float, float, float], ...]
    maps: tuple[tuple[tuple[float, ...], ...], ...]
    text: str = ""
    chat: bool = False
    written: str = ""

    def summary(self) -> str:
        return (
            f"layer {self.layer}: attention of {len(self.tokens)} tokens by {len(self.rows)} heads"
        )


@dataclass(frozen=True, slots=True)
class HeadsReport(Report):
    """Heads by a pattern, best first: (layer, head, score), a score of 1 is the pattern itself."""

    kind: ClassVar[str] = "heads"
    pattern: str
    rows: tuple[tuple[int, int, float], ...]

    def summary(self) -> str:
        layer, head, score = self.rows[0]
        return f"{self.pattern} heads: most so is head {head} of layer {layer}, {score:.2f} of 1"


@dataclass(frozen=True, slots=True)
class PatchReport(Report):
    """Scores of patching, [layers][columns], None where a layer has no such component.

    1 brings the metric to the clean run's, 0 leaves it at the corrupted run's. top: the strongest,
    (layer, column, label, score).
    """

    kind: ClassVar[str] = "patch"
    method: str
    component: ComponentName
    metric: str
    across: str
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    clean: float
    corrupted: float
    answer: str
    other: str
    top: tuple[tuple[int, int, str, float], ...]
    said: str
    written: str = ""

    def summary(self) -> str:
        return self.said


@dataclass(frozen=True, slots=True)
class AttributionReport(Report):
    """Direct shares of a logit: (part, logit), the largest first. total: the logit itself."""

    kind: ClassVar[str] = "attribution"
    answer: str
    other: str
    total: float
    unexplained: float
    shares: tuple[tuple[str, float], ...]
    said: str
    written: str = ""

    def summary(self) -> str:
        return self.said


@dataclass(frozen=True, slots=True)
class ActivationsReport(Report):
    """Activations that were written. rows: of each tensor."""

    kind: ClassVar[str] = "activations"
    path: str
    names: tuple[str, ...]
    rows: int
    bytes: int

    def summary(self) -> str:
        return (
            f"wrote {self.rows:,} rows of {len(self.names)} values to {self.path} "
            f"({self.bytes / 2**20:.1f} MiB)"
        )


@dataclass(frozen=True, slots=True)
class VectorRow:
    """One set of steering vectors. norms: [(layer, L2 norm)]. told_apart: (layer, share of held-out
    samples that the vector tells apart)."""

    name: str
    method: str
    norms: tuple[tuple[int, float], ...]
    told_apart: tuple[tuple[int, float], ...]
    state: str
    positive: int
    negative: int
    path: str = ""


@dataclass(frozen=True, slots=True)
class VectorsReport(Report):
    """Steering vectors in hand. standing: interventions in force, as text."""

    kind: ClassVar[str] = "vectors"
    rows: tuple[VectorRow, ...]
    standing: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def summary(self) -> str:
        if not self.rows:
            return "no steering vectors in hand; make some with vector make"
        if len(self.rows) > 1:
            return f"{len(self.rows)} sets of steering vectors: " + ", ".join(
                r.name for r in self.rows
            )
        row = self.rows[0]
        best = max(row.told_apart, key=lambda pair: pair[1], default=None)
        text = f"vectors {row.name} of {len(row.norms)} layers ({row.method})"
        if best is None:
            return text
        return f"{text}; layer {best[0]} separates {best[1]:.0%} of the held-out samples"


@dataclass(frozen=True, slots=True)
class ProbesReport(Report):
    """Linear probes of layers: (layer, accuracy, balanced accuracy), on held-out samples."""

    kind: ClassVar[str] = "probes"
    classes: tuple[str, ...]
    rows: tuple[tuple[int, float, float], ...]
    baseline: float
    trained: int
    held_out: int

    def summary(self) -> str:
        layer, accuracy, _ = max(self.rows, key=lambda row: row[1])
        return (
            f"{', '.join(self.classes)}: layer {layer} separates them best, {accuracy:.1%} right on "
            f"{self.held_out} held-out samples ({self.baseline:.1%} by naming the most frequent)"
        )


@dataclass(frozen=True, slots=True)
class SaeReport(Report):
    """A sparse autoencoder that was trained. width: D; features: F; tokens, steps: of training.

    loss: (tokens, mean squared error over the values' mean square around b_dec) while it trained.
    error: normalised, on `judged` held-out tokens; l0: active features a token; silent: share of
    features without activity there; dead: of those without any lately in training. None where no
    held-out sample has a value. plain, spliced, zeros: cross-entropy in nats of the model as it is,
    with the reconstruction and with zeros in place of the value; None where it was not run.
    """

    kind: ClassVar[str] = "sae"
    path: str
    at: str
    architecture: str
    width: int
    features: int
    k: int
    tokens: int
    steps: int
    loss: tuple[tuple[int, float], ...]
    dead: float
    error: float | None = None
    l0: float | None = None
    silent: float | None = None
    judged: int = 0
    plain: float | None = None
    spliced: float | None = None
    zeros: float | None = None
    kl_spliced: float | None = None
    kl_zeros: float | None = None
    recovered: float | None = None

    def summary(self) -> str:
        text = f"{self.features:,} features of {self.at} from {self.tokens:,} tokens"
        if self.error is not None:
            text += f"; on held-out tokens error {self.error:.3f}, L0 {self.l0:.1f}"
        if self.recovered is not None:
            text += f", {self.recovered:.1%} of the loss recovered"
        return f"{text}; {self.dead:.1%} dead"


@dataclass(frozen=True, slots=True)
class FeatureExample:
    """Where a feature is active. before, after: text around the token."""

    value: float
    sample: int
    position: int
    before: str
    token: str
    after: str


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """One feature. density: share of tokens at which it is active; mean: its mean there."""

    feature: int
    density: float
    mean: float
    examples: tuple[FeatureExample, ...]


@dataclass(frozen=True, slots=True)
class SaeFeaturesReport(Report):
    """Features of an autoencoder over a data set. silent: how many were never active."""

    kind: ClassVar[str] = "sae features"
    path: str
    at: str
    features: int
    tokens: int
    silent: int
    l0: float
    rows: tuple[FeatureRow, ...]

    def summary(self) -> str:
        return (
            f"{self.features:,} features of {self.at} over {self.tokens:,} tokens: L0 {self.l0:.1f}, "
            f"{self.silent:,} never active"
        )
