"""Renderers of the model's answers."""

from __future__ import annotations

from rich.console import Group, RenderableType

from commands.output.render.base import text
from mlxfun.generation.reports import ABReport, ChatReport


def chat(report: ChatReport) -> RenderableType:
    """The answer."""
    return Group(text(report.text), text(report.summary(), "dim"))


def ab(report: ABReport) -> RenderableType:
    """Both answers."""
    parts: list[RenderableType] = [text(report.summary())]
    for answer in (report.base, report.candidate):
        parts += [text(f"{answer.label} ({answer.finish_reason})", "bold"), text(answer.text)]
    return Group(*parts)
