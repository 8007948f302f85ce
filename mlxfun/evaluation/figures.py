"""Perplexity, mean KL and their intervals from what the evaluator measured at each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, sqrt
from typing import TYPE_CHECKING

import numpy as np

from mlxfun.errors import DatasetError
from mlxfun.evaluation.evaluator import Comparison, EvalSet, Likelihood

if TYPE_CHECKING:
    pass


def perplexity(likelihood: Likelihood) -> tuple[float, tuple[float, float]]:
    """Perplexity and its 95 % confidence interval.

    Ratio estimator over sequences: with s_i the summed loss and n_i the tokens of sequence i,
    m = sum s / sum n and Var(m) = n/(n-1) * sum (s_i - m n_i)^2 / (sum n)^2. A single sequence
    falls back to the spread of its tokens.
    """
    nll = likelihood.nll
    if not nll.size:
        raise DatasetError("no tokens to evaluate: every sample is shorter than two tokens")
    mean = float(nll.mean())
    _, groups = np.unique(likelihood.sequence, return_inverse=True)
    counts = np.bincount(groups)
    units = len(counts)
    if units > 1:
        residual = np.bincount(groups, weights=nll) - mean * counts
        error = sqrt(units / (units - 1) * float((residual**2).sum())) / float(nll.size)
    else:
        error = float(nll.std()) / sqrt(nll.size)
    return exp(mean), (exp(mean - 1.96 * error), exp(mean + 1.96 * error))


def joined(parts: Sequence[Likelihood]) -> Likelihood:
    """Several sets as one, their sequences kept apart."""
    offset, sequences = 0, []
    for part in parts:
        sequences.append(part.sequence + offset)
        offset += int(part.sequence.max(initial=-1)) + 1
    return Likelihood(np.concatenate([p.nll for p in parts]), np.concatenate(sequences))


def kl_figures(parts: Sequence[Comparison]) -> dict[str, float]:
    """kl_mean, kl_p99 (nats) and top1_agreement over all tokens."""
    kl = np.concatenate([part.kl for part in parts])
    agree = np.concatenate([part.agree for part in parts])
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(agree.mean()),
    }


def identical(likelihood: Likelihood) -> Comparison:
    """What comparing a state with itself gives."""
    count = likelihood.nll.size
    return Comparison(np.zeros(count), np.ones(count, dtype=np.bool_))


def iterate_sets(sets: Sequence[EvalSet]) -> Iterator[EvalSet]:
    """The sets, each under a name of its own."""
    seen: dict[str, int] = {}
    for data in sets:
        seen[data.name] = seen.get(data.name, 0) + 1
        name = data.name if seen[data.name] == 1 else f"{data.name}#{seen[data.name]}"
        yield EvalSet(name, data.sequences)
