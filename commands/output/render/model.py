"""Renderers of the resident model and of what is written of it."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from commands.output.render.base import new_table, pairs, text, with_notes
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.data.reports import DatasetReport
from mlxfun.distributed.reports import WorkersReport
from mlxfun.memory.plan.report import Fit, FitReport, ModelsReport
from mlxfun.memory.reports import ResidencyReport, SweepReport, skipping
from mlxfun.session.reports import InfoReport, LayersReport, SmokeReport
from mlxfun.text import counted, readable_bytes


def info(report: InfoReport) -> RenderableType:
    """Figures of the model, one a line."""
    kept = f"{report.experts_kept} of {report.experts}"
    experts = kept if report.experts_kept != report.experts else str(report.experts)
    routed = f"{experts} per layer, top-{report.top_k}, {report.router} router"
    layers = f"{report.moe_layers} of them MoE" if report.moe_layers else "without experts"
    limit = f" of {readable_bytes(report.memory_limit)}" if report.memory_limit else ""
    rows: list[tuple[str, Any]] = [
        ("model", report.model_id),
        ("source", report.source),
        ("type", report.model_type),
        ("layers", f"{report.decoder_layers}, {layers}"),
        ("experts", routed if report.moe_layers else None),
        ("groups", report.groups if report.groups > 1 else None),
        ("shared experts", report.shared_experts or None),
        ("parameters", f"{report.parameters:,}"),
        ("checkpoint", f"{readable_bytes(report.checkpoint_bytes)} ({report.dtype})"),
        ("quantisation", report.quantization),
        ("in memory", readable_bytes(report.bytes)),
        ("device", report.device),
        ("memory in use", f"{readable_bytes(report.memory_active)}{limit}"),
        ("chat template", report.chat_template or "none"),
        ("digest", report.digest),
    ]
    return with_notes(pairs(rows), report.notes)


def residency(report: ResidencyReport) -> RenderableType:
    """Slots, and what reading the other experts has cost."""
    if report.whole or report.streamed:
        return text(report.summary())
    rows: list[tuple[str, Any]] = [
        (
            "slots",
            f"{report.held}, in {report.layers} layers",
        ),
        ("in slots", readable_bytes(report.slot_bytes)),
        ("besides", f"{readable_bytes(report.kept_bytes)} of everything but experts"),
        ("whole model", readable_bytes(report.whole_bytes)),
        ("tokens", f"{report.tokens:,}"),
        ("hits", f"{report.hits:,} of {report.hits + report.misses:,} ({report.hit_rate:.1%})"),
        ("read ahead", f"{report.ahead:,} used, {report.ahead_unused:,} not"),
        ("evictions", f"{report.evictions:,}"),
        ("read", f"{readable_bytes(report.bytes_read)} in {report.seconds:.2f} s"),
        ("a token", readable_bytes(report.bytes_per_token)),
        ("disk", f"{readable_bytes(report.bandwidth)}/s while reading"),
    ]
    notes = [skipping(report.miss, report.skipped)[2:]] if report.miss == "skip" else []
    return with_notes(pairs(rows), notes)


def sweep(report: SweepReport) -> RenderableType:
    """Speed and hits at each number of slots."""
    names = ("slots a layer", "memory", "tokens/s", "hits", "read a token")
    table = new_table(*names, numbers=names)
    for row in report.rows:
        cells = (
            str(row.capacity),
            readable_bytes(row.bytes),
            f"{row.tokens_per_second:.1f}",
            f"{row.hit_rate:.1%}",
            readable_bytes(row.bytes_per_token),
        )
        table.add_row(*(text(cell) for cell in cells))
    return Group(table, text(report.summary()))


HOW: dict[Fit, str] = {
    "whole": "whole",
    "partly": "with some experts in memory, the others read when they are wanted",
    "streamed": "layer by layer only",
    "no": "in no way",
}


def fit(report: FitReport) -> RenderableType:
    """Bytes by part, what of the model fits, and what prunes would need."""
    rows: list[tuple[str, Any]] = [
        *((part, readable_bytes(size)) for part, size in report.parts.items()),
        ("whole", readable_bytes(report.whole)),
        ("a token passes", readable_bytes(report.active)),
        ("memory", readable_bytes(report.memory)),
        ("fits", HOW[report.fit]),
    ]
    if report.fit == "partly":
        use = "by the given use" if report.measured_use else "if all were used alike"
        rows += [
            ("slots", f"{report.some} in each layer"),
            ("held", readable_bytes(report.held)),
            ("hits", f"{report.hit_rate:.1%} {use}"),
            ("disk", _rate(report.bandwidth)),
            ("at most", _tokens(report.tokens_per_second)),
        ]
    rows.append(("layer by layer", readable_bytes(report.streamed)))
    for level in report.levels:
        fits = "fits" if level.fits else "does not fit"
        size = f"{level.left} experts a layer, {readable_bytes(level.bytes)}, {fits}"
        rows.append((f"prune {level.share:.0%}", size))
    notes = [report.note] if report.note else []
    return with_notes(Group(pairs(rows), text(report.summary())), notes)


def _rate(bandwidth: float | None) -> str | None:
    return None if bandwidth is None else f"{readable_bytes(bandwidth)}/s"


def _tokens(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.1f} tokens/s, by the disk alone"


def layers(report: LayersReport) -> RenderableType:
    """One line for each MoE layer; of a dense model one for each decoder layer."""
    if not report.rows:
        return Group(text(report.summary()), _decoder(report))
    numbers = ("layer", "experts", "kept", "top-k", "groups", "shared")
    table = new_table(
        *("layer", "router", "score", "experts", "kept", "top-k", "groups", "shared", "bias"),
        "path",
        numbers=numbers,
    )
    for row in report.rows:
        cells = (row.layer, row.router, row.score, row.experts, row.kept, row.top_k)
        more = (row.groups, row.shared_experts, "yes" if row.selection_bias else "no", row.path)
        table.add_row(*(text(str(c)) for c in (*cells, *more)))
    return Group(text(report.summary()), table)


def _decoder(report: LayersReport) -> Table:
    table = new_table("layer", "mixer", "feed forward", "size", "path", numbers=("layer", "size"))
    for row in report.decoder:
        size = readable_bytes(row.bytes)
        cells = (str(row.layer), row.mixer, row.feed_forward, size, row.path)
        table.add_row(*(text(cell) for cell in cells))
    return table


def save(report: SaveReport) -> RenderableType:
    """Where the model was written, and the checks it passed."""
    rows: list[tuple[str, Any]] = [
        ("saved", report.path),
        (
            "size",
            f"{readable_bytes(report.bytes)} in {counted(len(report.files), 'file', 'files')}",
        ),
        ("experts", f"{report.experts} per layer" if report.experts else None),
        ("quantisation", report.quantization),
        *((f"check {name}", outcome) for name, outcome in report.gate.items()),
    ]
    return with_notes(pairs(rows), report.notices)


def smoke(report: SmokeReport) -> RenderableType:
    """The checks and the text that was generated."""
    return Group(text(report.summary()), pairs(report.checks.items()), text(report.text))


def models(report: ModelsReport) -> RenderableType:
    """The models on this machine, one a line."""
    table = new_table("model", "known from", "in memory", "", numbers=("in memory",))
    for row in report.models:
        size = readable_bytes(row.bytes) if row.bytes else ""
        table.add_row(row.source, row.origin, size, row.words)
    return Group(text(report.summary()), table)


def workers(report: WorkersReport) -> RenderableType:
    """The workers, one a line."""
    if not report.workers:
        return text(report.summary())
    table = new_table("worker", "machine", "device", "batches", numbers=("worker", "batches"))
    for row in report.workers:
        table.add_row(str(row.rank), row.host, row.device, f"{row.batches:,}")
    return Group(text(report.summary()), table)


def dataset(report: DatasetReport) -> RenderableType:
    """Forms, lengths, and the first sample as the model sees it."""
    rows: list[tuple[str, Any]] = [("samples", f"{report.samples:,}")]
    rows += [("written as", f"{form}: {count:,}") for form, count in report.forms.items()]
    found = report.lengths
    if found is not None:
        rows.append(("length", f"{found.least:,} to {found.most:,} {report.unit}"))
        rows.append(("", f"median {found.median:,}, mean {found.mean:,.1f}, 95% {found.p95:,}"))
        rows.append(("together", f"{found.total:,} {report.unit}"))
    if report.max_tokens is not None:
        rows.append(("cut at", f"{report.max_tokens:,} tokens"))
    return Group(
        text(report.summary()), pairs(rows), text("first sample:", "dim"), text(report.first)
    )
