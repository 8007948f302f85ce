"""Statistics of a differential scan: which experts do two sets of samples use differently, beyond
chance?

Legend: S samples, N = L * E experts in one row. For sample s, f_s(e) is the share of its tokens
that selected expert e, g_s(e) the mean over its tokens of the weight applied to e (0 where it was
not selected). With sets A and B and a bar for the mean over a set's samples:

    differential_freq        df = mean_A f - mean_B f
    differential_activation  dg = mean_A g - mean_B g
    composite                c  = (df / max|df| + dg / max|dg|) / 2, maxima over the model

so c is in [-1, 1], and positive where an expert works more on A. Percentiles of c alone flag the
same number of experts on any data, so an expert counts only if it passes three rules at once:

* percentile: c is in the top (or bottom) 100 - P percent of the live experts, with that sign;
* significance: the two-sample t statistic of u = f / sd(f) + g / sd(g) (deviations over all
  samples, blind to which set they are of) against the same statistic under shuffled set labels.
  Standardised, the shuffled statistics of all experts form one null, so p-values resolve far below
  one in the number of shuffles; then Benjamini-Hochberg: q <= alpha;
* stability: the share of bootstrap resamples of the samples in which the percentile rule chooses
  the expert again, on the same side (stability selection, Meinshausen & Buehlmann 2010).

Samples, not tokens, are shuffled and resampled: the tokens of one text are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlxfun.errors import DatasetError, UsageError
from mlxfun.text import counted

if TYPE_CHECKING:
    from mlxfun.arrays import Array

Bools = NDArray[np.bool_]

LEAST_SAMPLES = 4
"""Below this a set has too few arrangements for a test to mean anything."""

NO_DIFFERENCE = 1e-6
"""Differences below this are float32 noise and are not blown up to a composite of 1."""


@dataclass(frozen=True, slots=True)
class Rules:
    """percentile P in (0, 100); alpha: bound on q; min_stability: bound on the bootstrap share."""

    percentile: float = 90.0
    alpha: float = 0.01
    min_stability: float = 0.7
    shuffles: int = 200
    resamples: int = 200
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for impossible rules."""
        if not 50 <= self.percentile < 100:
            raise UsageError(
                f"--threshold-percentile {self.percentile:g} must be at least 50 and below 100"
            )
        if not 0 < self.alpha < 1:
            raise UsageError(f"--alpha {self.alpha:g} must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class SampleRouting:
    """Routing of a set, per sample.

    frequency, gate: float64 [S, L, E]. tokens: int64 [S]. answer_counts: float64 [L, E], tokens of
    the answers that selected each expert; answer_tokens: how many tokens the answers have.
    """

    frequency: Array
    gate: Array
    tokens: Array
    answer_counts: Array
    answer_tokens: int

    @property
    def samples(self) -> int:
        """S."""
        return int(self.frequency.shape[0])


@dataclass(frozen=True, slots=True)
class Contrast:
    """A compared with B; every array is [L, E].

    more, less: bool, experts that work more on A, more on B, by all three rules. by_percentile:
    bool, those the percentile rule alone would name. risk_difference: None unless both sets have
    answers.
    """

    differential_freq: Array
    differential_activation: Array
    composite: Array
    p: Array
    q: Array
    stability: Array
    more: Bools
    less: Bools
    by_percentile: Bools
    risk_difference: Array | None


def contrast(a: SampleRouting, b: SampleRouting, alive: Bools, rules: Rules) -> Contrast:
    """Compare two sets over the live experts, bool [L, E].

    Raises UsageError for impossible rules, DatasetError for too few samples.
    """
    rules.check()
    require_samples("the first set", a.samples)
    require_samples("the second set", b.samples)
    shape = alive.shape
    live = alive.reshape(-1)
    f, g = (
        np.concatenate([x.reshape(len(x), -1), y.reshape(len(y), -1)])[:, live]
        for x, y in ((a.frequency, b.frequency), (a.gate, b.gate))
    )
    is_a = np.arange(len(f)) < a.samples
    df, dg = _difference(f, is_a), _difference(g, is_a)
    mixed = (f / _largest(df) + g / _largest(dg)) / 2
    composite = _difference(mixed, is_a)
    rng = np.random.default_rng(rules.seed)
    p = permutation_p(
        _standardised(f) + _standardised(g), is_a, shuffled(is_a, rules.shuffles, rng)
    )
    q = benjamini_hochberg(p)
    stability = stability_of(mixed, is_a, rules, rng)
    high, low = chosen_by_percentile(composite, rules.percentile)
    sure = (q <= rules.alpha) & (stability >= rules.min_stability)

    def spread(values: Array, fill: float = 0.0) -> Array:
        out = np.full(live.shape, fill, dtype=values.dtype)
        out[live] = values
        return out.reshape(shape)

    return Contrast(
        differential_freq=spread(df),
        differential_activation=spread(dg),
        composite=spread(composite),
        p=spread(p, 1.0),
        q=spread(q, 1.0),
        stability=spread(stability),
        more=spread(high & sure),
        less=spread(low & sure),
        by_percentile=spread(high | low),
        risk_difference=risk_difference(a, b),
    )


def require_samples(name: str, found: int) -> None:
    """Raise DatasetError when a set has too few samples to be compared."""
    if found < LEAST_SAMPLES:
        raise DatasetError(
            f"{counted(found, 'sample', 'samples')} of {name} can be used; a comparison that can tell "
            f"a difference from chance needs at least {LEAST_SAMPLES}, and some dozens to find small "
            "ones; give more text, or raise --max-samples"
        )


def _difference(values: Array, is_a: Bools) -> Array:
    result: Array = values[is_a].mean(axis=0) - values[~is_a].mean(axis=0)
    return result


def _largest(difference: Array) -> float:
    return max(float(np.abs(difference).max(initial=0.0)), NO_DIFFERENCE)


def _standardised(values: Array) -> Array:
    """Each column centred and divided by its deviation; constant ones become 0."""
    centred = values - values.mean(axis=0)
    deviation = values.std(axis=0)
    # Relative: the float32 sums of an expert that is chosen always differ by rounding alone.
    real = deviation > NO_DIFFERENCE * np.maximum(np.abs(values).max(axis=0), NO_DIFFERENCE)
    result: Array = np.divide(centred, deviation, out=np.zeros_like(centred), where=real)
    return result


def shuffled(is_a: Bools, count: int, rng: np.random.Generator) -> Bools:
    """bool [count, S]: `is_a` in random orders."""
    return rng.permuted(np.tile(is_a, (count, 1)), axis=1)


def t_statistics(u: Array, labels: Bools) -> Array:
    """Two-sample t with pooled variance, [P, N], of u [S, N] for each row of labels [P, S]."""
    u = u - u.mean(axis=0)
    n = u.shape[0]
    n_a = int(labels[0].sum())
    n_b = n - n_a
    mean_a = labels.astype(np.float64) @ u / n_a
    mean_b = -mean_a * n_a / n_b  # the columns are centred
    total = np.square(u).sum(axis=0)
    within = total - n_a * np.square(mean_a) - n_b * np.square(mean_b)
    # Perfect separation has no variance left; a floor keeps it the largest finite value.
    variance = np.maximum(within, 1e-12 * total) / (n - 2)
    error = np.sqrt(variance * (1 / n_a + 1 / n_b))
    result: Array = np.divide(mean_a - mean_b, error, out=np.zeros_like(mean_a), where=error > 0)
    return result


def permutation_p(u: Array, is_a: Bools, labels: Bools) -> Array:
    """Two-sided p-values [N] of |t| against the pooled |t| under the shuffled labels [P, S].

    Columns of u that are constant have p = 1 and lend nothing to the null: their zeros would make
    every other expert look rarer than it is.
    """
    varied = np.square(u).sum(axis=0) > 0
    p = np.ones(u.shape[1])
    if not varied.any():
        return p
    null = np.sort(np.abs(t_statistics(u[:, varied], labels)), axis=None)
    found = np.abs(t_statistics(u[:, varied], is_a[None])[0])
    # A shuffle that gives the same split back must count, whatever its rounding.
    as_large = null.size - np.searchsorted(null, found * (1 - 1e-9) - 1e-12)
    p[varied] = (1 + as_large) / (1 + null.size)
    return p


def benjamini_hochberg(p: Array) -> Array:
    """q-values: the smallest false discovery rate at which each p-value would be accepted.

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])).round(4).tolist()
    [0.04, 0.0533, 0.0533, 0.5]
    """
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q


def chosen_by_percentile(composite: Array, percentile: float) -> tuple[Bools, Bools]:
    """(high, low) bool [..., N]: the tails of each row of composites, on their own side of 0."""
    high, low = np.percentile(composite, [percentile, 100 - percentile], axis=-1, keepdims=True)
    return (composite >= high) & (composite > 0), (composite <= low) & (composite < 0)


def stability_of(mixed: Array, is_a: Bools, rules: Rules, rng: np.random.Generator) -> Array:
    """[N]: share of resamples in which the percentile rule chooses an expert on its own side.

    mixed: [S, N], whose difference of means is the composite.
    """
    resampled = _resampled_means(mixed[is_a], rules.resamples, rng)
    resampled -= _resampled_means(mixed[~is_a], rules.resamples, rng)
    high, low = chosen_by_percentile(resampled, rules.percentile)
    composite = _difference(mixed, is_a)
    result: Array = np.where(composite >= 0, high.mean(axis=0), low.mean(axis=0))
    return result


def _resampled_means(values: Array, count: int, rng: np.random.Generator) -> Array:
    """Means [count, N] of bootstrap resamples of the rows of values [S, N]."""
    n = len(values)
    times = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
    result: Array = times @ values / n
    return result


def risk_difference(a: SampleRouting, b: SampleRouting) -> Array | None:
    """SteerMoE (arXiv 2509.09660), [L, E]: a1 / (a1 + d1) - a2 / (a2 + d2) over answer tokens.

    a counts the answer tokens that selected an expert, d those that did not; None unless both
    sets have answers.
    """
    if not (a.answer_tokens and b.answer_tokens):
        return None
    result: Array = a.answer_counts / a.answer_tokens - b.answer_counts / b.answer_tokens
    return result
