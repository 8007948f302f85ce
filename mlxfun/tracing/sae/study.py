"""An autoencoder of a resident model, from samples to a report: trained and judged, or looked through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.errors import UsageError
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.options import SaeFeaturesOptions, SaeTrainOptions, SaeUseOptions
from mlxfun.tracing.reports import FeatureExample, FeatureRow, SaeFeaturesReport, SaeReport
from mlxfun.tracing.sae.features import (
    Activity,
    clamp_feature,
    feature_activity,
    steer_feature,
)
from mlxfun.tracing.sae.files import load_sae, require_fitting_sae
from mlxfun.tracing.sae.judging import fit, splice
from mlxfun.tracing.sae.sources import FileSource, ModelSource, Source
from mlxfun.tracing.sae.training import train_sae
from mlxfun.tracing.tracer import Tracer

BEFORE, AFTER = 8, 4
"""Tokens that are shown around an example."""

Rows = Sequence[Sequence[int]]


def train_and_judge(
    model: Tracer,
    rows: Rows | None,
    options: SaeTrainOptions,
    about: Mapping[str, str],
    ctx: Context = SILENT,
) -> SaeReport:
    """Train on samples, or on a file of activations, write the directory and judge what came out.

    rows: token ids of samples; None only with a file, and then the model is not run. about:
    provenance of the samples' values; that of a file's is in the file.
    """
    training = options.training
    source: Source
    if options.values is not None:
        source = FileSource(options.values, options.at, training.skip)
        held, about = rows, source.made_on
    else:
        if rows is None or options.at is None:
            raise UsageError(
                "an autoencoder is of one value (at) and trained on samples, or a file"
            )
        source, held = ModelSource(model, rows, options.at, training.skip), None
    made = train_sae(source, training, options.path, options.resume, about, ctx)
    if isinstance(source, ModelSource):
        held = [source.rows[unit] for unit in made.held_out]
    sae = made.autoencoder
    fitted = fit(sae, source, made.held_out, ctx)
    spliced = None
    if held is not None and options.judged:
        require_fitting_sae(sae, model, str(options.path))
        spliced = splice(model, sae, held[: options.judged], ctx=ctx)
    report = SaeReport(
        str(options.path), sae.at, sae.kind, sae.width, sae.features, training.k, made.tokens,
        made.steps, made.loss, made.dead,
    )  # fmt: skip
    if fitted is not None:
        report = replace(report, error=fitted.error, l0=fitted.l0, silent=fitted.silent,
                         judged=fitted.tokens)  # fmt: skip
    if spliced is None:
        return report
    return replace(
        report, plain=spliced.plain, spliced=spliced.spliced, zeros=spliced.zeros,
        kl_spliced=spliced.kl_spliced, kl_zeros=spliced.kl_zeros, recovered=spliced.recovered,
    )  # fmt: skip


def look_through(
    model: Tracer, rows: Rows, options: SaeFeaturesOptions, ctx: Context = SILENT
) -> SaeFeaturesReport:
    """The features of an autoencoder over samples, with their strongest examples."""
    sae = load_sae(options.path, options.at)
    require_fitting_sae(sae, model, str(options.path))
    for feature in options.features or ():
        sae.require_feature(feature)
    found = feature_activity(sae, ModelSource(model, rows, sae.at, sae.skip), options.examples, ctx)
    chosen = options.features
    if chosen is None:
        order = np.argsort(-found.values[:, 0], kind="stable")[: options.count]
        chosen = tuple(int(one) for one in order if found.density[one] > 0)
    made = tuple(_row(found, feature, model.parts.tokenizer) for feature in chosen)
    silent = int((found.density == 0).sum())
    return SaeFeaturesReport(
        str(options.path), sae.at, sae.features, found.tokens, silent, float(found.density.sum()),
        made,
    )  # fmt: skip


def _row(found: Activity, feature: int, tokenizer: Tokenizer) -> FeatureRow:
    examples = []
    for value, (sample, at) in zip(found.values[feature], found.places[feature], strict=True):
        if value <= 0:
            break
        row, place = found.rows[sample], int(at)
        before, after = row[max(0, place - BEFORE) : place], row[place + 1 : place + 1 + AFTER]
        words = [tokenizer.decode(part) if part else "" for part in (before, [row[place]], after)]
        examples.append(FeatureExample(float(value), int(sample), place, *words))
    return FeatureRow(
        feature, float(found.density[feature]), float(found.mean[feature]), tuple(examples)
    )


def feature_change(model: Tracer, options: SaeUseOptions) -> tuple[str, Intervention]:
    """(name, intervention) of a feature. Raises UsageError unless one of strength and level is
    given, for an unknown feature, or an autoencoder that does not fit."""
    if (options.strength is None) == (options.level is None):
        raise UsageError(
            "a feature is added with a strength, or clamped to a level: give one of both"
        )
    sae = load_sae(options.path, options.at)
    require_fitting_sae(sae, model, str(options.path))
    if options.strength is not None:
        return sae.at, steer_feature(sae, options.feature, options.strength)
    assert options.level is not None
    return sae.at, clamp_feature(sae, options.feature, options.level)
