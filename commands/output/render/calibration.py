"""Renderers of routing statistics and of the scores of one expert."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Group, RenderableType

from commands.output.render.base import experts_text, new_table, pairs, text, with_notes
from mlxfun.calibration.reports import (
    CombineReport,
    DiffReport,
    Extreme,
    Figures,
    PurgeReport,
    RankReport,
    StatsReport,
    WhyReport,
)


def stats(report: StatsReport) -> RenderableType:
    """The least and the most used experts."""
    table = new_table("least", "reap_sum", "most", "reap_sum")
    for low, high in zip(report.least, report.most, strict=False):
        table.add_row(*(text(cell) for row in (low, high) for cell in _scored(row)))
    return Group(text(report.summary()), table) if report.least else text(report.summary())


def _scored(row: tuple[int, int, float]) -> tuple[str, str]:
    layer, expert, score = row
    return f"{layer}:{expert}", f"{score:.4g}"


def diff(report: DiffReport) -> RenderableType:
    """Rank correlation by metric, then the experts that differ most."""
    metrics = new_table("metric", "rank correlation", "lowest quarter shared")
    for name, value in report.rank_correlation.items():
        metrics.add_row(text(name), f"{value:.3f}", f"{report.overlap[name]:.0%}")
    table = new_table("expert", "share in A", "share in B", numbers=("share in A", "share in B"))
    for row in report.rows:
        table.add_row(f"{row.layer}:{row.expert}", f"{row.share_a:.2%}", f"{row.share_b:.2%}")
    parts: list[RenderableType] = [text(report.summary()), metrics, table]
    if report.figures is not None:
        parts += _figures(report.figures)
    return with_notes(Group(*parts), report.notices)


def _figures(found: Figures) -> list[RenderableType]:
    """What the scores by one metric differ by, and the experts at both ends."""
    spread = (("mean", found.mean), ("std", found.std), ("min", found.min), ("max", found.max))
    rows = [(f"A - B by {found.metric}", ", ".join(f"{k} {v:.4g}" for k, v in spread))]
    rows.append(
        ("experts", f"{found.positive} higher in A, {found.negative} in B, {found.zero} equal")
    )
    ends = new_table("higher in A", "by", "higher in B", "by", numbers=("by",))
    for one, two in zip_longest(found.higher, found.lower):
        ends.add_row(*(text(cell) for end in (one, two) for cell in _end(end)))
    return [pairs(rows), ends]


def _end(found: Extreme | None) -> tuple[str, str]:
    return (
        ("", "") if found is None else (f"{found.layer}:{found.expert}", f"{found.difference:.4g}")
    )


def sentence(report: CombineReport | PurgeReport) -> RenderableType:
    """The sentence and its notes."""
    return with_notes(text(report.summary()), report.notices)


def rank(report: RankReport) -> RenderableType:
    """The experts chosen in each layer, and the summed ranks."""
    table = new_table("expert", "ranks", "sum", numbers=("sum",))
    for row in report.rows:
        table.add_row(f"{row.layer}:{row.expert}", " ".join(map(str, row.ranks)), str(row.total))
    goes = pairs((f"layer {k}", experts_text(v)) for k, v in report.chosen.items() if v)
    return with_notes(Group(text(report.summary()), goes, table), report.notices)


def why(report: WhyReport) -> RenderableType:
    """Score and rank of one expert by each metric."""
    table = new_table("metric", "score", f"rank of {report.of}", numbers=("score",))
    for name, score in report.scores.items():
        table.add_row(text(name), f"{score:.6g}", str(report.ranks.get(name, "")))
    return Group(text(report.summary()), table)
