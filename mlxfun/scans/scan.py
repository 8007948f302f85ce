"""Runs a safety or domain scan: both data sets, the contrast between them, the report file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.checkpoint.load import Loaded
from mlxfun.context import Context
from mlxfun.data.datasets import read_lines
from mlxfun.data.options import DatasetOptions, ExpertSets, ScanKind
from mlxfun.data.scan_reports import REPORT, write_report
from mlxfun.editing.editor import Editor
from mlxfun.files import require_writable
from mlxfun.hooks.routing import Taps
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.anatomy.masks import mask_of
from mlxfun.scans import contrast, sample_routing
from mlxfun.scans.contrast import Contrast, Rules, SampleRouting
from mlxfun.scans.options import ScanOptions
from mlxfun.scans.reports import ScanReport, ScanRow

FEW_SAMPLES = 20
"""Below this a set finds only large differences, and the report says so."""


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """What is scanned: the committed weights of `editor`, without steering."""

    loaded: Loaded
    anatomy: MoEMap
    taps: Taps
    editor: Editor
    options: ScanOptions


def run(kind: ScanKind, request: ScanRequest, ctx: Context) -> ScanReport:
    """Make a "safety" or "domain" report and write it to the output.

    Both sets are read and the rules checked before the first forward.
    """
    options, loaded = request.options, request.loaded
    require_writable(options.output, REPORT)
    rules = Rules(options.threshold_percentile, options.alpha, seed=options.first.seed)
    rules.check()
    sets = (options.first, options.second)
    tally = ctx.reading()
    found = [
        sample_routing.samples(read_lines(d, tally), loaded.tokenizer, d.max_tokens, tally)
        for d in sets
    ]
    for data, samples in zip(sets, found, strict=True):
        contrast.require_samples(data.source, len(samples))
    with request.editor.live("base"), request.editor.unsteered():
        label = f"scanning {' and '.join(map(_name, sets))}"
        first, second = sample_routing.scan_sets(loaded.model, request.taps, found, ctx, label)
    alive = mask_of(request.anatomy, request.editor.committed)
    result = contrast.contrast(first, second, alive, rules)
    write_report(
        options.output, kind, result, request.anatomy.indices, _about(kind, request, first, second)
    )
    return _report(kind, request, result, (first, second))


def _name(data: DatasetOptions) -> str:
    return " + ".join(source.rpartition("/")[2] for source, _ in data.parts)


def _about(
    kind: ScanKind, request: ScanRequest, first: SampleRouting, second: SampleRouting
) -> dict[str, Any]:
    """What the report was made on. Sets are named without their directories."""
    options = request.options
    about: dict[str, Any] = {"domain_name": options.domain_name} if kind == "domain" else {}
    return about | {
        "threshold_percentile": options.threshold_percentile,
        "alpha": options.alpha,
        "model": request.loaded.checkpoint_id,
        "model_name": request.loaded.model_id,
        "state": request.editor.state,
        "sets": [
            {
                "name": _name(data),
                "samples": routing.samples,
                "tokens": int(routing.tokens.sum()),
                "answer_tokens": routing.answer_tokens,
                "max_tokens": data.max_tokens,
                "seed": data.seed,
            }
            for data, routing in ((options.first, first), (options.second, second))
        ],
    }


def _report(
    kind: ScanKind, request: ScanRequest, found: Contrast, sets: tuple[SampleRouting, SampleRouting]
) -> ScanReport:
    options, layers = request.options, request.anatomy.indices
    first, second = sets
    return ScanReport(
        technique=kind,
        name=options.domain_name or "safety",
        path=str(options.output),
        state=request.editor.state,
        first=options.first.source,
        second=options.second.source,
        samples=(first.samples, second.samples),
        tokens=(int(first.tokens.sum()), int(second.tokens.sum())),
        experts=sum(len(live) for live in request.editor.committed),
        threshold_percentile=options.threshold_percentile,
        alpha=options.alpha,
        more=_sets(found.more, layers),
        less=_sets(found.less, layers),
        by_percentile=int(found.by_percentile.sum()),
        rows=_rows(found, layers),
        notices=_notices(request, found, sets),
    )


def _sets(mask: Mask, layers: tuple[int, ...]) -> ExpertSets:
    return {
        layer: tuple(int(e) for e in np.flatnonzero(experts))
        for layer, experts in zip(layers, mask, strict=True)
        if experts.any()
    }


def _rows(found: Contrast, layers: tuple[int, ...]) -> tuple[ScanRow, ...]:
    """The flagged experts, strongest composite first."""
    rows, experts = np.nonzero(found.more | found.less)
    order = np.argsort(-np.abs(found.composite[rows, experts]), kind="stable")
    risk = found.risk_difference
    return tuple(
        ScanRow(
            layer=layers[r],
            expert=int(e),
            composite=float(found.composite[r, e]),
            differential_freq=float(found.differential_freq[r, e]),
            differential_activation=float(found.differential_activation[r, e]),
            q=float(found.q[r, e]),
            stability=float(found.stability[r, e]),
            risk_difference=None if risk is None else float(risk[r, e]),
        )
        for r, e in zip(rows[order], experts[order], strict=True)
    )


def _notices(
    request: ScanRequest, found: Contrast, sets: tuple[SampleRouting, SampleRouting]
) -> tuple[str, ...]:
    notices = []
    flagged = int((found.more | found.less).sum())
    named = int(found.by_percentile.sum())
    if named > flagged:
        notices.append(
            f"the percentile rule alone flags {named:,} experts; {named - flagged:,} are left out: "
            "within chance, or not the same on other choices of samples"
        )
    few = min(routing.samples for routing in sets)
    if few < FEW_SAMPLES:
        notices.append(
            f"{few} samples in a set find only large differences; some dozens are better"
        )
    if not request.editor.steering_of("base").empty:
        notices.append("the steering in force was left out of the scan")
    return tuple(notices)
