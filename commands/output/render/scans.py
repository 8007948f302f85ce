"""Renderers of scans, steering and the profile of one expert."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType

from commands.output.render.base import experts_text, new_table, pairs, text, with_notes
from commands.output.render.calibration import why
from mlxfun.scans.reports import DossierReport, ScanReport, TopicsReport
from mlxfun.steering.reports import SteerReport

SHOWN_TOPICS = 40
SHOWN_ROWS = 20  # flagged experts listed before "and n more in the file"


def scan(report: ScanReport) -> RenderableType:
    """The strongest of the flagged experts."""
    names = ("composite", "frequency", "gate", "q", "stability")
    answers = any(row.risk_difference is not None for row in report.rows)
    columns = (*names, *(("risk difference",) if answers else ()))
    table = new_table("expert", *columns, numbers=columns)
    for row in report.rows[:SHOWN_ROWS]:
        shown = [f"{row.composite:+.3f}", f"{row.differential_freq:+.3f}"]
        shown += [f"{row.differential_activation:+.4f}", f"{row.q:.2g}", f"{row.stability:.2f}"]
        if answers:
            shown.append("" if row.risk_difference is None else f"{row.risk_difference:+.3f}")
        table.add_row(f"{row.layer}:{row.expert}", *shown)
    parts: list[RenderableType] = [text(report.summary())]
    if report.rows:
        parts.append(table)
    if len(report.rows) > SHOWN_ROWS:
        parts.append(text(f"and {len(report.rows) - SHOWN_ROWS} more in the file", "dim"))
    return with_notes(Group(*parts), report.notices)


def steer(report: SteerReport) -> RenderableType:
    """The experts steered in each layer, and the scan reports in force."""
    rows: list[tuple[str, Any]] = []
    if report.rule == "additive" and (report.activated or report.deactivated):
        rows.append(
            ("added", f"{report.boost_value:+g} where on, {report.mask_value:+g} where off")
        )
    for name, sets in (("force on", report.activated), ("force off", report.deactivated)):
        rows += [(f"{name}, layer {k}", experts_text(v)) for k, v in sets.items()]
    for layer, levels in report.levels.items():
        rows.append((f"bias, layer {layer}", ", ".join(f"{e} {x:+g}" for e, x in levels.items())))
    for use in report.maps:
        rows.append(
            (f"{use.kind} report", f"{use.path}, {use.mode}: {len(use.cells)} of its experts")
        )
    for one in report.interventions:
        origin = f", from {one.source}" if one.source and one.strength is None else ""
        rows.append((f"at {one.name}", f"{one.said}{origin}"))
    return with_notes(Group(text(report.summary()), pairs(rows)), report.notices)


def topics(report: TopicsReport) -> RenderableType:
    """The topics, the surest first."""
    table = new_table("expert", "serves", "from", "")
    table.columns[-1].no_wrap = True  # a sentence: beside the others in full, or below them
    for row in sorted(report.rows, key=lambda row: (row.q, row.layer, row.expert))[:SHOWN_TOPICS]:
        table.add_row(f"{row.layer}:{row.expert}", row.words, row.source, row.evidence)
    parts: list[RenderableType] = [text(report.summary())]
    parts += [table] if report.rows else []
    if len(report.rows) > SHOWN_TOPICS:
        more = len(report.rows) - SHOWN_TOPICS
        parts.append(text(f"and {more} more: export topics FILE.csv writes all", "dim"))
    return Group(*parts)


def dossier(report: DossierReport) -> RenderableType:
    """Figures of one expert and the tokens it serves most."""
    tokens = new_table("token", "routed here", "of", numbers=("routed here", "of"))
    for row in report.top_tokens:
        tokens.add_row(text(repr(row.text)), str(row.served), str(row.of))
    topic = f"{report.topic}: {report.topic_evidence}" if report.topic else "not significant"
    notes = [f"topic: {topic}", *([report.note] if report.note else [])]
    return with_notes(Group(text(report.summary()), why(report.why), tokens), notes)
