"""Routing statistics per layer and expert: accumulators, metrics, `.npz` files.

Every array is float64 [L, E] in checkpoint numbering. With g the weight as the model applies it
and f the expert's output, summed over the tokens routed to an expert:

    freq               number of tokens
    weighted_freq_sum  sum of g
    ean_sum            sum of ||f||_2
    reap_sum           sum of g * ||f||_2          (REAP, arXiv 2510.13999, is its mean)
    reap_sq_sum        sum of (g * ||f||_2)^2
    ean_sq_sum         sum of ||f||_2^2

Where a router's weight scales the input of an expert (llama4), ||f||_2 has the weight in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from mlxfun.calibration.archive import Archive
from mlxfun.calibration.options import METRICS, Combined, Metric
from mlxfun.errors import DatasetError, ModelError, PlanError, StateError, UsageError
from mlxfun.files import Kind, writing

if TYPE_CHECKING:
    from mlxfun.arrays import Array

SUMS = ("freq", "weighted_freq_sum", "ean_sum", "reap_sum", "reap_sq_sum", "ean_sq_sum")
"""Order of the accumulators in an update [L, S, E]."""

MEANS = {"reap": "reap_sum", "man": "ean_sum", "msan": "ean_sq_sum"}
"""Metrics that are a mean over an expert's own tokens, and the sum that each is the mean of."""

MEAN_RANK = "reap_rank"
RANKS = {"reap": MEAN_RANK, "man": "man_rank", "msan": "msan_rank"}
"""In statistics merged by rank: the summed rank scores of the means."""


def _has_sums(path: Path) -> bool:
    try:
        with ZipFile(path) as archive:
            return {"freq.npy", "reap_sum.npy"} <= set(archive.namelist())
    except (BadZipFile, NotImplementedError):
        return False


STATISTICS = Kind("routing statistics", _has_sums)


def require_finite(sums: Array) -> None:
    """Raise ModelError for sums of what a broken model computed."""
    if not np.isfinite(sums).all():
        raise ModelError(
            "the model computes NaN or infinity on this text, so nothing can be counted; "
            "smoke-test tells more, undo the edit that broke it"
        )


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Accumulated statistics and what they were made on.

    sums: accumulator name -> float64 [L, E]; one that a file lacks is absent. layer_indices: decoder layer of each row. model and
    state: checkpoint id and state of the weights ("" when a file does not say). steered: some of
    the tokens were routed under steering, in chat that was counted: a calibration runs without
    (older files may be of one that ran with it). combined: "" for a run, "sum" or "rank" for a
    merge of `sources` runs; see mlxfun.calibration.combine. alive: bool [L, E], who could be chosen; None
    where a file does not say.
    """

    sums: Mapping[str, Array]
    layer_indices: tuple[int, ...]
    samples: int = 0
    tokens: int = 0
    model: str = ""
    model_name: str = ""
    state: str = ""
    steered: bool = False
    combined: Combined = ""
    sources: int = 1
    alive: Array | None = None

    @classmethod
    def empty(cls, layer_indices: tuple[int, ...], experts: int, **identity: Any) -> RoutingStats:
        """Zeros for L = len(layer_indices) layers of `experts` experts."""
        shape = (len(layer_indices), experts)
        return cls({name: np.zeros(shape) for name in SUMS}, layer_indices, **identity)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        rows, columns = self.sums["freq"].shape
        return int(rows), int(columns)

    def plus(self, update: Array, samples: int, tokens: int, steered: bool = False) -> RoutingStats:
        """With one batch's sums, float [L, S, E] in the order of SUMS, added in float64.

        Raises ModelError for NaN and infinity.
        """
        wide = update.astype(np.float64)
        require_finite(wide)
        # A sum that the statistics began without would be one of a part of their tokens.
        sums = {
            name: self.sums[name] + wide[:, i] for i, name in enumerate(SUMS) if name in self.sums
        }
        return replace(
            self,
            sums=sums,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            steered=self.steered or steered,
        )

    def score(self, metric: Metric) -> Array:
        """Scores [L, E], higher is more important; an expert that was never routed scores 0.

        freq, weighted_freq, ean, reap_sum and reap_sq are sums; reap, man and msan (mean and mean
        squared norm of the output without the router's weight) are means over an expert's own
        tokens. Raises StateError where the statistics lack the sum that the metric is made of.
        """
        if metric not in METRICS:
            raise UsageError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
        name = self._made_of(metric)
        if name not in self.sums:
            raise StateError(
                f"the statistics have no {name}, which --metric {metric} needs: another program or "
                "an earlier version made them; collect again, or choose one of "
                f"{', '.join(self.metrics)}"
            )
        score: Array = self.sums[name]
        if metric in MEANS and self.combined != "rank":
            freq = self.sums["freq"]
            return np.divide(score, freq, out=np.zeros_like(freq), where=freq > 0)
        return score

    def ranking_score(self, metric: Metric) -> Array:
        """`score`, to choose experts by. Raises StateError where it is 0 for all although tokens
        were routed: servers that count without measuring norms write such sums.
        """
        score = self.score(metric)
        if self.sums["freq"].any() and not score.any():
            others = ", ".join(name for name in self.metrics if self.score(name).any())
            raise StateError(
                f"every expert scores 0 by {metric} in these statistics: what it is made of was "
                f"not measured; choose one of {others}, or collect again"
            )
        return score

    def _made_of(self, metric: str) -> str:
        """The name of the accumulator."""
        if metric in MEANS:
            return (RANKS if self.combined == "rank" else MEANS)[metric]
        return metric if metric in SUMS else f"{metric}_sum"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that `score` knows of these statistics."""
        return tuple(metric for metric in METRICS if self._made_of(metric) in self.sums)

    def coverage(self, alive: Array) -> float:
        """Share of the live (layer, expert) pairs that were routed to at least once."""
        return float((self.sums["freq"] > 0)[alive].mean()) if alive.any() else 0.0

    def unseen(self, alive: Array) -> tuple[tuple[int, int], ...]:
        """(decoder layer, expert) of the live experts never routed to."""
        rows, experts = np.nonzero((self.sums["freq"] == 0) & alive)
        return tuple((self.layer_indices[r], int(e)) for r, e in zip(rows, experts, strict=True))

    def suggested_samples(self, alive: Array) -> int | None:
        """Samples after which the rarest live experts would be expected about three times.

        An unseen expert's rate is at most about 3 / tokens (the 95 % rule of three), so three
        times as many samples is the honest next step; None when everything was seen.
        """
        return 3 * max(self.samples, 1) if self.unseen(alive) else None

    def save(self, path: Path) -> None:
        """Write an `.npz` that other tools of the family read (extra keys are ignored there).

        Raises SaveError when it cannot be written.
        """
        rows, experts = self.shape
        arrays: dict[str, Any] = dict(self.sums)
        if self.alive is not None:
            arrays["alive"] = self.alive
        with writing(path, STATISTICS) as file:
            np.savez_compressed(
                file,
                **arrays,
                reap_count=self._reap_count(),
                num_layers=np.int64(rows),
                num_experts=np.int64(experts),
                layer_indices=np.array(self.layer_indices, dtype=np.int64),
                samples=np.int64(self.samples),
                tokens=np.int64(self.tokens),
                model=np.str_(self.model),
                model_name=np.str_(self.model_name),
                state=np.str_(self.state),
                steered=np.bool_(self.steered),
                combined=np.str_(self.combined),
                sources=np.int64(self.sources),
            )

    def _reap_count(self) -> Array:
        """What others divide reap_sum by to get the mean [L, E].

        Of ranks there is no such count; the quotient then gives them the mean's ranks.
        """
        if self.combined != "rank":
            freq: Array = self.sums["freq"]
            return freq
        mean, total = self.sums[MEAN_RANK], self.sums["reap_sum"]
        count: Array = np.divide(total, mean, out=np.zeros_like(total), where=mean > 0)
        return count

    @classmethod
    def load(cls, path: Path, layer_indices: tuple[int, ...], experts: int) -> RoutingStats:
        """Read an `.npz` made on a model of that anatomy, with or without the extra keys.

        Raises DatasetError for a file that is missing or not statistics, PlanError for other
        layers or another shape than the model's.
        """
        stats = cls.read(path)
        shape = (len(layer_indices), experts)
        found = stats.shape
        if found != shape:
            raise PlanError(
                f"{path} holds statistics of {' x '.join(map(str, found))} (layers x experts) but "
                f"the model has {shape[0]} x {shape[1]}; collect on this model, or load the model "
                "they were made on"
            )
        # Files of other tools, and merges of them, count positions and name no model.
        positions = not stats.model and stats.layer_indices == tuple(range(shape[0]))
        if stats.layer_indices != layer_indices and not positions:
            raise PlanError(
                f"{path} holds statistics of the decoder layers {_listed(stats.layer_indices)}; "
                f"the model's are {_listed(layer_indices)}; collect on this model"
            )
        return replace(stats, layer_indices=layer_indices)

    @classmethod
    def read(cls, path: Path) -> RoutingStats:
        """Read an `.npz` as it is, of any model. Without layer_indices, positions stand for them.

        Raises DatasetError for a file that is missing, not statistics, or holds a value that
        cannot be.
        """
        data = Archive(path)
        combined = data.combined
        if combined == "rank" and MEAN_RANK not in data:
            raise DatasetError(f"{path} was merged by rank but lacks {MEAN_RANK}")
        names = (*SUMS, *RANKS.values()) if combined == "rank" else SUMS
        layers = data.layers
        return cls(
            sums={name: data.sums(name) for name in names if name in data},
            layer_indices=tuple(range(data.shape[0])) if layers is None else layers,
            samples=data.count("samples"),
            tokens=data.count("tokens"),
            model=data.text("model"),
            model_name=data.text("model_name"),
            state=data.text("state"),
            steered=data.flag("steered"),
            combined=combined,
            sources=data.count("sources", default=1, least=1),
            alive=data.mask("alive"),
        )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
