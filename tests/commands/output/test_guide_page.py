"""A guide is laid out for the width at which it is drawn, wherever that is."""

from __future__ import annotations

import io

from rich.console import Console

from commands.guides.index import source
from commands.guides.layout import plain
from commands.guides.report import GuideReport
from commands.output.console import print_report
from commands.output.render.dispatch import render
from commands.registry import help_text

REPORT = GuideReport(help_text("pruning"), "pruning")


def drawn(width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(REPORT))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_narrow_panel_wraps_it_anew() -> None:
    assert drawn(44) == plain(source("pruning"), 44).splitlines()
    assert max(map(len, drawn(44))) <= 44


def test_a_wide_one_keeps_lines_that_are_easy_to_read() -> None:
    assert drawn(200) == REPORT.text.splitlines()


def test_a_file_or_a_pipe_gets_the_page_of_help() -> None:
    stream = io.StringIO()
    print_report(REPORT, stream)
    assert stream.getvalue() == REPORT.text + "\n"
