"""How good an autoencoder is: of its values, and of the model that goes on with what it makes.

    normalised error    sum ||x - x'||^2 / sum ||x - mean x||^2
    L0                  mean number of active features of a token
    recovered           (CE with zeros - CE with x') / (CE with zeros - CE as it is): 1 where the
                        model does not notice, 0 where zeros would do as well

Cross-entropy is that of the sample's own next token, in nats; KL is KL(model || changed model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.tracing.interventions import Function, Intervention, zero_out
from mlxfun.tracing.prompts import padded
from mlxfun.tracing.sae.autoencoder import Autoencoder
from mlxfun.tracing.sae.sources import Source
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved


@dataclass(frozen=True, slots=True)
class Fit:
    """On `tokens` values: normalised error, L0, and the share of features that none activates."""

    error: float
    l0: float
    silent: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Splice:
    """Mean cross-entropy and KL in nats over `tokens` predictions: as it is, with the value replaced
    by its reconstruction, and by zeros."""

    plain: float
    spliced: float
    zeros: float
    kl_spliced: float
    kl_zeros: float
    tokens: int

    @property
    def recovered(self) -> float | None:
        """See the module's text; None where zeros change nothing."""
        lost = self.zeros - self.plain
        return None if abs(lost) < 1e-9 else (self.zeros - self.spliced) / lost


def fit(
    sae: Autoencoder, source: Source, units: Sequence[int], ctx: Context = SILENT
) -> Fit | None:
    """Figures of some units of a source, one unit at a time; None where they have no values."""
    squared = active = tokens = 0.0
    total, square = np.zeros(sae.width), 0.0
    seen = np.zeros(sae.features, np.bool_)
    step = sae.rows_at_once()
    for unit in units:
        ctx.check()
        values = source.read([unit])
        for first in range(0, len(values), step):
            x = values[first : first + step]
            features = sae.encode(mx.array(x))
            error = np.array(sae.decode(features), np.float64) - x
            on = np.array(features) > 0
            squared, active = squared + float(np.square(error).sum()), active + int(on.sum())
            seen |= on.any(0)
            total += x.sum(0, dtype=np.float64)
            square += float(np.square(x, dtype=np.float64).sum())
            tokens += len(x)
    if not tokens:
        return None
    spread = square - float(total @ total) / tokens
    return Fit(squared / max(spread, 1e-30), active / tokens, float((~seen).mean()), int(tokens))


def reconstruction(sae: Autoencoder) -> Function:
    """What puts x' in place of x, in its dtype."""
    return sae.reconstruct


def splice(
    model: Tracer,
    sae: Autoencoder,
    rows: Sequence[Sequence[int]],
    most: int = 256,
    ctx: Context = SILENT,
) -> Splice | None:
    """What the model makes of x' and of zeros in place of the value, sample by sample.

    The first `sae.skip` tokens keep their values. most: tokens of a sample that are run. None where
    no sample has a next token to judge.
    """
    sums, tokens = np.zeros(5), 0
    for number, whole in enumerate(rows):
        ctx.check()
        row = list(whole)[:most]
        if len(row) <= sae.skip + 1:
            continue
        places = list(range(sae.skip, len(row)))
        made = Intervention("function", function=reconstruction(sae), positions=places)
        plain, spliced, zeros = (
            _log_p(model, sae.at, row, change)[sae.skip :]
            for change in (None, made, zero_out(positions=places))
        )
        wanted = mx.array(row[sae.skip + 1 :])[:, None]
        said = [-mx.take_along_axis(log_p[:-1], wanted, axis=-1).sum()
                for log_p in (plain, spliced, zeros)]  # fmt: skip
        said += [_divergence(plain[:-1], other[:-1]) for other in (spliced, zeros)]
        sums += np.array([float(np.array(one)) for one in said])
        tokens += len(row) - sae.skip - 1
        ctx.progress("judging the reconstruction", number + 1, len(rows), "samples")
    if not tokens:
        return None
    plain_ce, spliced_ce, zeros_ce, kl, kl_zeros = (sums / tokens).tolist()
    return Splice(plain_ce, spliced_ce, zeros_ce, kl, kl_zeros, tokens)


def _log_p(model: Tracer, at: str, row: list[int], change: Intervention | None) -> mx.array:
    """Log-probabilities [T, V], float32."""
    names = model.parts.names
    output = Saved(names.point("output"))
    edits = [] if change is None else [(names.point(at), change)]
    run_once(model.parts, padded([row]), edits, [output])
    z = output.value[0].astype(mx.float32)
    found = z - mx.logsumexp(z, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def _divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    p = mx.exp(log_p)
    return mx.where(p > 0, p * (log_p - log_q), 0.0).sum()
