"""Renderers of the history and of a recipe's variants."""

from __future__ import annotations

from rich.console import Group, RenderableType

from commands.output.render.base import new_table, text
from mlxfun.editing.reports import HistoryReport
from mlxfun.session.measuring.variants import RecipeReport
from mlxfun.text import readable_bytes


def history(report: HistoryReport) -> RenderableType:
    """One line for each state; the current one is marked."""
    table = new_table("", "node", "parent", "state", "held", "command", "scores", numbers=("node",))
    for node in report.nodes:
        scores = ", ".join(f"{k} {v:.4g}" for k, v in node.scores.items())
        table.add_row(
            "*" if node.id == report.current else "",
            str(node.id),
            "" if node.parent is None else str(node.parent),
            text(node.state),
            readable_bytes(node.bytes),
            text(f"{node.label}: {node.command}" if node.label else node.command),
            text(scores),
        )
    return Group(text(report.summary()), table)


def recipe(report: RecipeReport) -> RenderableType:
    """One line for each variant; the one kept is marked."""
    numbers = ("size", "KL", "perplexity x checkpoint")
    table = new_table("", "variant", *numbers, numbers=numbers)
    for number, variant in enumerate(report.variants):
        mark = "*" if number == report.kept else ""
        if variant.kl is None or variant.ratio is None:
            table.add_row(mark, text(f"{variant.line}: {variant.error}", "yellow"))
            continue
        size = readable_bytes(variant.bytes)
        figures = (size, f"{variant.kl:.4f}", f"{variant.ratio:.3f}")
        table.add_row(mark, text(variant.line), *figures)
    files = text("wrote " + ", ".join(report.files), "dim")
    return Group(text(report.summary()), table, files)
