"""Options of the commands that look inside a model: plain data, nothing heavy imported.

chat, wherever it stands: texts are asked as questions, through the chat template, so that the last
token is where the answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ComponentName = Literal["residual", "attn", "mlp", "head", "expert", "route"]
COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)
MetricName = Literal["logit_diff", "probability", "kl"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
PatchMethod = Literal["activation", "path", "attribution"]
PATCH_METHODS: tuple[PatchMethod, ...] = get_args(PatchMethod)
HeadKind = Literal["previous token", "first token", "induction"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
VectorMethod = Literal["mean", "pca"]
VECTOR_METHODS: tuple[VectorMethod, ...] = get_args(VectorMethod)
SaeKind = Literal["topk", "jumprelu"]
SAE_KINDS: tuple[SaeKind, ...] = get_args(SaeKind)
EXPORTS = (".svg", ".png", ".pdf", ".json", ".md", ".csv")
PICTURES = (".svg", ".png", ".pdf")
"""What a result can be written as, by the file's suffix."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """text: the prompt. at: names of values, `*` and 2-5 for layers. position: whose figures."""

    text: str
    at: tuple[str, ...] = ("layers.*.residual",)
    position: int = -1
    chat: bool = False


@dataclass(frozen=True, slots=True)
class DifferenceOptions:
    """against: "checkpoint", "base" (of a staged plan), or a node of the history."""

    text: str
    against: str = "checkpoint"
    chat: bool = False


@dataclass(frozen=True, slots=True)
class LensOptions:
    """layers, positions: all by default. answers: tokens to follow. tuned: a file of tune-lens.
    export: a file of the result."""

    text: str
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    top_k: int = 5
    answers: tuple[str, ...] = ()
    tuned: Path | None = None
    export: Path | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class TuneLensOptions:
    """path: a new safetensors file. layers: all but the last by default. passes: over the samples;
    rate: of Adam."""

    path: Path
    layers: tuple[int, ...] | None = None
    passes: int = 3
    rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """layer, head: which map. every: small maps of all heads of the layer instead. find: rank all
    heads by a pattern instead, without a text."""

    text: str = ""
    layer: int = 0
    head: int = 0
    find: HeadKind | None = None
    export: Path | None = None
    chat: bool = False
    every: bool = False


@dataclass(frozen=True, slots=True)
class PatchOptions:
    """answer, other: tokens of the metric, by default what the two runs say. receiver: of paths."""

    clean: str
    corrupted: str
    component: ComponentName = "residual"
    metric: MetricName = "logit_diff"
    method: PatchMethod = "activation"
    answer: str | None = None
    other: str | None = None
    layers: tuple[int, ...] | None = None
    receiver: str = "output"
    export: Path | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class AttributeOptions:
    """answer: by default what the model says; other: what it is compared with."""

    text: str
    answer: str | None = None
    other: str | None = None
    position: int = -1
    export: Path | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True)
class ActivationOptions:
    """at: names of values. position: of each sample; None for all tokens. path: a new safetensors
    file. prompts: samples are asked, see VectorOptions."""

    path: Path
    at: tuple[str, ...] = ("layers.*.residual",)
    position: int | None = -1
    prompts: bool = False


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """name: of the vectors in the session. layers: all by default. position: of each sample.

    prompts: each sample up to its first question, through the chat template, so that the last token
    is the one behind which the answer begins; else samples as they are.
    """

    name: str
    method: VectorMethod = "mean"
    layers: tuple[int, ...] | None = None
    position: int = -1
    prompts: bool = False


@dataclass(frozen=True, slots=True)
class ProbeTrainOptions:
    """layers: all by default. held_out: share of the samples that judge the probes. prompts: see
    VectorOptions."""

    layers: tuple[int, ...] | None = None
    position: int = -1
    held_out: float = 0.25
    seed: int = 0
    prompts: bool = False


@dataclass(frozen=True, slots=True)
class SaeTraining:
    """How a sparse autoencoder is trained. See mlxfun.tracing.sae.training for the formulas.

    kind: topk or jumprelu. features: how many; 0 for 8 times the value's width. k: active features
    of a token; of jumprelu the target for their mean. passes: over the samples. batch: tokens of a
    step. rate: of Adam; 0 for 2e-4 * sqrt(16384 / features), at most 3e-3, after Gao et al. 2024.
    buffer: the most values (tokens) that are mixed with each other; 0 for what fits in 256 MiB, at
    most 65536. held_out: share of the samples that judge. dead_after: tokens without activity after
    which a feature counts as dead; 0 for a tenth of a pass, at most 1,000,000. auxiliary: weight of
    the loss of dead features. sparsity: weight of jumprelu's penalty. bandwidth: of its estimator;
    0 for 0.05 / sqrt(width). skip: first tokens of each sample that are left out (attention sinks,
    whose values are far larger than others').
    """

    kind: SaeKind = "topk"
    features: int = 0
    k: int = 32
    passes: int = 1
    batch: int = 1024
    rate: float = 0.0
    buffer: int = 0
    held_out: float = 0.05
    dead_after: int = 0
    auxiliary: float = 1 / 32
    sparsity: float = 1.0
    bandwidth: float = 0.0
    skip: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SaeTrainOptions:
    """path: a directory for the autoencoder. at: the value's name; values: a file of activations
    that holds it, in place of forwards. judged: samples over which the model goes on with what is
    reconstructed."""

    path: Path
    at: str | None
    training: SaeTraining = SaeTraining()
    values: Path | None = None
    resume: bool = False
    judged: int = 16


@dataclass(frozen=True, slots=True)
class SaeFeaturesOptions:
    """path: directory of an autoencoder. at: its value, where the files do not say. features: which
    are shown; None for the `count` with the largest values. examples: of each."""

    path: Path
    at: str | None = None
    features: tuple[int, ...] | None = None
    count: int = 10
    examples: int = 5


@dataclass(frozen=True, slots=True)
class SaeUseOptions:
    """A feature: strength is added times its direction, or it is clamped to a level; one of both."""

    path: Path
    feature: int
    strength: float | None = None
    level: float | None = None
    at: str | None = None
