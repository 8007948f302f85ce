"""Options of the techniques: frozen, documented, free of MLX so that any front end can build them.

Expert sets are `{decoder layer: (expert, ...)}`; experts keep the number they had in the
checkpoint for as long as the session lives, whatever was pruned before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from mlxfun.errors import UsageError

ExpertSets = dict[int, tuple[int, ...]]

SEEDS = range(2**63)
"""What NumPy's generators and MLX's take."""


def require_seed(seed: int) -> int:
    """`seed` itself. Raises UsageError for one that some generator would not take."""
    if seed not in SEEDS:
        shown = seed if abs(seed) < 10**20 else "that is given"
        raise UsageError(f"the seed {shown} must be at least 0 and below 2^63")
    return seed


METRICS = ("freq", "weighted_freq", "reap", "ean", "reap_sum", "reap_sq")
PRUNE_METRICS = (*METRICS, "output_error", "auto")
"""Of a prune: the statistics, or what is measured while pruning (see mlxfun.measured)."""
STRATEGIES = ("bottom", "strided")
BUDGETS = ("equal", "global")
STEER_RULES = ("steermoe", "additive")
MAP_MODES = {"safety": ("safe", "unsafe"), "domain": ("boost", "suppress")}
"""How a scan's report can steer, by its kind; the first is the default."""
SIMILARITY_MODES = ("gated", "average")
ALIGNMENTS = ("hungarian", "greedy", "none")


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """Where text comes from. source: a path, a directory, or "demo:NAME"."""

    source: str
    text_key: str = "content"
    max_samples: int | None = None
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Calibration. batch_tokens bounds a padded batch (rows x longest row), max_batch its rows.

    None: what suits the device. add: to the statistics in hand instead of starting anew. known: an
    `.npz` that this very calibration made before; it is read and nothing runs.
    """

    data: DatasetOptions
    batch_tokens: int | None = None
    max_batch: int | None = None
    add: bool = False
    known: Path | None = None


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Which experts go. n_prune counts experts per layer (indices with model_wide).

    budget: "equal", or "global" for counts per layer that average to n_prune. sequential: each
    layer is judged on what the pruned layers before it put out. refit_experts: the experts that
    stay take over what went, by least squares.
    """

    n_prune: int | None = None
    metric: str = "reap_sum"
    strategy: str = "bottom"
    model_wide: bool = False
    ignore_experts: tuple[int, ...] = ()
    min_experts_per_layer: int | None = None
    expert_list: Path | None = None
    safety_map: Path | None = None
    safety_mode: str = "protect"  # "protect" or "target"
    domain_map: Path | None = None
    domain_mode: str = "protect"
    allow_stale: bool = False
    budget: str = "equal"
    sequential: bool = False
    refit_experts: bool = False


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """A comparison of two sets: harmful and benign, or a domain and general text.

    output: where the report goes. alpha bounds the false discovery rate among flagged experts.
    domain_name: of a domain scan.
    """

    first: DatasetOptions
    second: DatasetOptions
    output: Path
    threshold_percentile: float = 90.0
    alpha: float = 0.01
    domain_name: str = ""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Which experts are merged away, and how. n_prune: see PruneOptions.

    data: what the experts are compared on. metric: the saliency that picks centroids and weighs
    members. expert_list: names the centroids. auto: members are merged only where that serves the
    layer's output better than dropping them. refit_experts: as in PruneOptions. max_*_tokens: how many tokens, evenly spread over
    the data, experts are compared and aligned on; saliency uses all of them.
    """

    data: DatasetOptions
    n_prune: int | None = None
    metric: str = "reap"
    model_wide: bool = False
    ignore_experts: tuple[int, ...] = ()
    expert_list: Path | None = None
    similarity_mode: str = "gated"
    alignment: str = "hungarian"
    max_group_size: int = 16
    max_similarity_tokens: int = 1024
    max_alignment_tokens: int = 1024
    safety_map: Path | None = None
    safety_mode: str = "protect"
    domain_map: Path | None = None
    domain_mode: str = "protect"
    allow_stale: bool = False
    auto: bool = False
    refit_experts: bool = False


@dataclass(frozen=True, slots=True)
class AmplifyOptions:
    """Which experts are raised in their routers: those of a domain report, by scale x (composite
    score - threshold). data: calibration text, needed where boosts are folded into router rows.
    """

    domain_map: Path
    data: DatasetOptions | None = None
    scale: float = 0.5
    threshold: float = 0.0
    allow_stale: bool = False


@dataclass(frozen=True, slots=True)
class BakeOptions:
    """data: calibration text, see AmplifyOptions."""

    data: DatasetOptions | None = None


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """A data set of the Hub and what is kept of it.

    where: (column, value) pairs that must all hold, compared as text. Without text_column,
    `messages`, then `prompt` with `completion`, then `text` is taken. Lengths in characters.
    """

    source: str
    output: Path
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    text_column: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    min_chars: int | None = None
    max_chars: int | None = None
    max_samples: int | None = None


@dataclass(frozen=True, slots=True)
class ScanMap:
    """A scan's report and how it steers. kind: "safety" or "domain".

    mode of a safety report: "safe" activates what works more on harmful prompts and deactivates
    what works more on benign ones, "unsafe" the reverse; of a domain report: "boost" activates the
    domain's experts, "suppress" deactivates them. most: take only so many of its experts, over the
    whole model, strongest first; None for all.
    """

    path: Path
    kind: str
    mode: str
    most: int | None = None


@dataclass(frozen=True, slots=True)
class MapInForce:
    """A scan's report that steers. path, kind, mode and most: see ScanMap.

    names: the (decoder layer, expert) pairs that it would steer without a limit and if nothing were
    in the way; cells: those that it steers and nobody has named by hand.
    """

    path: str
    kind: str
    mode: str
    most: int | None
    names: tuple[tuple[int, int], ...]
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SteerOptions:
    """Experts to favour or to bar. Empty sets change nothing.

    maps: reports of scans, all at once; a later one goes before an earlier one, and the sets and
    the configuration before all of them, see mlxfun.steering_files. config: a JSON file. rule,
    boost_value and mask_value: None leaves what is in force; the values serve the additive rule.
    levels: {decoder layer: {expert: added to its score}}; 0 takes a level away.
    """

    activate: ExpertSets = field(default_factory=dict)
    deactivate: ExpertSets = field(default_factory=dict)
    clear: bool = False
    maps: tuple[ScanMap, ...] = ()
    config: Path | None = None
    rule: str | None = None
    boost_value: float | None = None
    mask_value: float | None = None
    allow_stale: bool = False
    levels: dict[int, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to measure. datasets empty: the held-out split of the calibration set."""

    datasets: tuple[DatasetOptions, ...] = ()
    kl: bool = True
    samples: int = 0
    sample_tokens: int = 48


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Decoding. side: "live", "base" or "candidate". Raises UsageError for impossible numbers."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    side: str = "live"
    system: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not 0 <= self.temperature < inf:
            raise UsageError(f"--temperature {self.temperature:g} must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g} must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Where and how to write. quantize: bits, or None to keep what was loaded."""

    path: Path
    force: bool = False
    quantize: int | None = None
    group_size: int = 64
    max_shard_bytes: int = 5 << 30


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """Guardrails of apply; with any set, a missing preview is made first."""

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
