"""The profile page of one expert: its place in the layer, its tokens, its nearest neighbour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlxfun.scans.reports import DossierReport
from tui.text import bar, harmless

if TYPE_CHECKING:
    from tui.state.app_state import AppState

DIM, BOLD = "dim", "bold"
WIDTH = 64
"""Columns of the layer's picture; wider layers share columns, the busiest of each is shown."""
HEIGHTS = " ▁▂▃▄▅▆▇█"


def dossier_page(report: DossierReport, state: AppState) -> Group:
    """The page about one expert."""
    why = report.why
    parts: list[RenderableType] = [
        Text(f"layer {why.layer}, expert {why.expert}", style="bold underline"),
        Text(),
        Text(f"{why.status}: {why.verdict}"),
        topic(report, state),
    ]
    parts += [Text(), *layer_picture(report, state)]
    parts += [Text(), figures(report)]
    parts += [Text(), Text(likeness(report)), Text(), *tokens(report)]
    return Group(*parts)


def topic(report: DossierReport, state: AppState) -> Text:
    """What the expert serves, by this page's own look and by scans."""
    heat, why = state.view.heat, report.why
    known = heat.topics.get((why.layer, why.expert), "") if heat is not None else ""
    words = known or report.topic
    if not words:
        return Text("serves: nothing more than other tokens (not significant)", DIM)
    text = Text.assemble("serves: ", (harmless(words), BOLD))
    if report.topic_evidence:
        text.append(f"  {harmless(report.topic_evidence)}", DIM)
    return text


def layer_picture(report: DossierReport, state: AppState) -> list[RenderableType]:
    """The layer's experts by score, highest first, with this one marked."""
    from tui.input.expert_selection import metric_of

    heat, why = state.view.heat, report.why
    if heat is None or why.layer not in heat.layers:
        return []
    row, name = heat.layers.index(why.layer), metric_of(state)
    values = heat.metrics.get(name)
    if values is None:
        return []
    alive = [e for e in range(heat.experts) if heat.alive[row, e]]
    order = sorted(alive, key=lambda e: (-float(values[row, e]), e))
    top, low = float(values[row, order[0]]), float(values[row, order[-1]])
    pool = -(-len(order) // WIDTH)
    title = f"layer {why.layer} by {name}, highest first: {top:.4g} to {low:.4g}"
    # Scores that lie close together would all be full bars: the range is the scale, and said.
    text = Text(f"{title}\n", style=DIM)
    place = order.index(why.expert) // pool if why.expert in order else -1
    for column, first in enumerate(range(0, len(order), pool)):
        part = (float(values[row, order[first]]) - low) / (top - low) if top > low else 1.0
        height = round(part * (len(HEIGHTS) - 1))
        style = "bold reverse" if column == place else "not dim"
        text.append(HEIGHTS[max(1, height)], style)
    text.append("\n" + " " * max(0, place) + ("▴" if place >= 0 else ""), "bold not dim")
    return [text]


def figures(report: DossierReport) -> Table:
    """Score and rank by each metric."""
    out = Table(box=None, padding=(0, 2, 0, 0), header_style=DIM)
    for title, justify in (("metric", "left"), ("score", "right"), ("rank", "right")):
        out.add_column(title, justify="right" if justify == "right" else "left")
    for name, score in report.why.scores.items():
        out.add_row(name, f"{score:.5g}", f"{report.why.ranks[name]} of {report.why.of}")
    share = report.served / report.tokens if report.tokens else 0.0
    out.add_row("tokens routed", f"{report.served}", f"{share:.1%} of {report.tokens} tokens")
    out.add_row("mean weight", f"{report.mean_weight:.3f}", "")
    return out


def likeness(report: DossierReport) -> str:
    """The most similar expert of the layer, or why there is none."""
    if report.partner is None:
        return f"no similar expert to merge with: {report.note}"
    return (
        f"most similar expert of the layer: {report.partner} (similarity {report.alike:.2f}, 1 is "
        "identical); a merge would combine these two first"
    )


def tokens(report: DossierReport) -> list[RenderableType]:
    """The tokens that the expert serves most, as shares of their occurrences."""
    if not report.top_tokens:
        return [Text(f"no token of {report.dataset} is mostly routed to it", style=DIM)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=DIM)
    table.add_column("top tokens", no_wrap=True)
    table.add_column("routed here", no_wrap=True)
    base = report.served / report.tokens if report.tokens else 0.0
    for row in report.top_tokens:
        # From the share of all tokens on: what every token has in common is no news.
        above = (row.served / row.of - base) / (1 - base) if base < 1 else 0.0
        served = Text.assemble(bar(max(0.0, above), 10), f" {row.served} of {row.of}")
        table.add_row(Text(repr(harmless(row.text)), BOLD), served)
    said = f"bars begin at {base:.1%}, its share of all tokens; measured on {report.dataset}"
    return [table, Text(said, style=DIM)]
