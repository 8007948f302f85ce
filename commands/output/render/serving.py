"""Renderer of the server beside the shell."""

from __future__ import annotations

from rich.console import Group, RenderableType

from commands.output.render.base import new_table, text
from mlxfun.serving.snapshot import ServingReport

SHOWN_PROBLEMS = 5


def serving(report: ServingReport) -> RenderableType:
    """Requests, totals by client, what went wrong last."""
    parts: list[RenderableType] = [text(report.summary())]
    if report.requests:
        numbers = ("prompt", "cached", "generated", "tokens/s", "seconds")
        table = new_table("request", "client", "side", *numbers, numbers=numbers)
        for one in report.requests:
            rate = "waiting" if one.waiting else f"{one.rate:.1f}"
            shown = (one.prompt, one.cached, one.generated, rate, f"{one.seconds:.1f}")
            table.add_row(text(str(one.id)), text(one.client), one.side, *map(str, shown))
        parts.append(table)
    if report.clients:
        numbers = ("requests", "failed", "prompt", "cached", "generated")
        table = new_table("client", *numbers, numbers=numbers)
        for client in report.clients:
            counts = (client.requests, client.failed, client.prompt)
            more = (client.cached, client.generated)
            table.add_row(text(client.name), *map(str, (*counts, *more)))
        parts.append(table)
    last = report.problems[:SHOWN_PROBLEMS]
    problems = [text(f"{p.status} {p.client}: {p.message}", "yellow") for p in last]
    return Group(*parts, *problems)
