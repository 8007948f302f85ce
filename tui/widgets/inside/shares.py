"""The page of an attribution: which parts wrote a word, as bars."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlxfun.tracing.reports import AttributionReport
from tui.text import bar

ROWS = 24


def shares_page(report: AttributionReport) -> Group:
    """The largest shares of a logit, positive and negative ones apart by colour and sign."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max((abs(logit) for _, logit in report.shares), default=1.0) or 1.0
    for name, logit in report.shares[:ROWS]:
        style = "green" if logit >= 0 else "red"
        table.add_row(Text(name), Text(f"{logit:+.2f}"), Text(bar(abs(logit) / most, 24), style))
    said = "the shares of all parts sum to the logit; heads are a split of their attention's share"
    return Group(
        Text(f"who wrote {report.answer!r}", style="bold underline"), Text(),
        Text(report.summary()), Text(), table, Text(), Text(said, style="dim"),
    )  # fmt: skip
