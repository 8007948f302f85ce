"""`export`: write the heatmap, the topics, the session report or the conversation to a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.conditions import always, with_stats, with_topics
from commands.declare import Call, Command, Params, command
from commands.output.session_report import session_report
from commands.types import FigureSize, NewFile, Whole
from mlxfun.calibration.options import METRICS
from mlxfun.errors import SaveError, StateError, UsageError
from mlxfun.files import require_writable, writing
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report, TextReport, plain
from mlxfun.scans.reports import TopicsReport
from mlxfun.text import escaped, no_experts, readable_bytes, visible

if TYPE_CHECKING:
    from commands.output.heatmap_files import Picture

HEATMAP = (".svg", ".png", ".pdf", ".csv", ".md")
PALETTES, SCALINGS = ("print", "light", "screen"), ("linear", "log", "rank")  # of its figures
CHAT = (".md", ".json")


def _write(call: Call, make: Callable[[str], str | bytes]) -> Report:
    """Write what `make` gives for the kind of file that PATH's name says."""
    path: Path = call.bench.writable(call["path"])
    require_writable(path)
    if path.exists() and not call["force"]:
        raise SaveError(f"{path} exists: choose another name, or add --force")
    made = make(path.suffix.lower())
    data = made if isinstance(made, bytes) else _text(made, path.suffix.lower()).encode()
    with writing(path, new=not call["force"]) as file:
        file.write(data)
    return TextReport(f"wrote {path} ({readable_bytes(len(data))})")


def _text(made: str, kind: str) -> str:
    """`made` without control characters; JSON holds them as escapes."""
    return escaped(made) if kind == ".json" else visible(made)


force = click.option("--force", is_flag=True, help="Write over a file of that name.")


@command("export heatmap", group="observe", when=with_stats, read_only=True)
@click.argument("path", type=NewFile(HEATMAP))
@click.option(
    "--metric", type=click.Choice(METRICS), help="What is drawn (default: reap_sum, see set)."
)
@click.option(
    "--palette",
    type=click.Choice(PALETTES),
    help="Of a figure: cividis on white (print), or the screen's colours (light, screen).",
)
@click.option(
    "--scale", type=click.Choice(SCALINGS), help="How scores become colours (default: linear)."
)
@click.option("--sort", is_flag=True, help="Order the experts of each layer by score.")
@click.option(
    "--size",
    type=FigureSize(),
    metavar="WxH",
    help="Millimetres, such as 180x90 or 85 (default: 180).",
)
@click.option(
    "--dpi",
    type=Whole(30, 1200),
    metavar="N",
    help="Dots per inch of a .png (default: 300).",
)
@click.option(
    "--title", metavar="TEXT", help="Title of a figure (default: the model and its state)."
)
@force
def heatmap(call: Call) -> Report:
    """Write the experts as a figure for a paper, or as a table: .svg .png .pdf, .csv or .md.

    Figures have title, axes, colour bar and legend, and mark staged, pruned, never seen, protected
    and steered experts. They need the extra: pip install 'mlxfun[plots]'. Without it, .svg is drawn
    plainly. .csv has all metrics.
    """
    from commands.output import heatmap_files  # NumPy comes with it, after the first paint

    view = call.bench.view()
    if view.model is not None and not view.model.moe_layers:
        raise StateError(no_experts(view.model.model_type, "draw"))
    name = view.model.model_id if view.model else ""
    metric = call["metric"] or call.bench.settings.metric
    drawn = heatmap_files.picture(view.heat, metric, f"Experts of {name}, state {view.state}")
    kinds: dict[str, Callable[[heatmap_files.Picture], str | bytes]] = {
        ".csv": heatmap_files.table,
        ".md": heatmap_files.markdown,
    }
    asked = _figure_options(call.params)

    def make(kind: str) -> str | bytes:
        if kind in kinds:
            if asked:
                raise UsageError(f"--{next(iter(asked))} is of a figure, and {kind} is a table")
            return kinds[kind](drawn)
        if kind == ".svg" and not asked and find_spec("matplotlib") is None:
            return heatmap_files.svg(drawn)
        return _figure(drawn, kind, asked)

    return _write(call, make)


def _figure_options(params: Params) -> dict[str, Any]:
    """The options of a figure that were given."""
    names = ("palette", "scale", "sort", "size", "dpi", "title")
    return {name: params[name] for name in names if params[name] not in (None, False)}


def _figure(drawn: Picture, kind: str, asked: dict[str, Any]) -> bytes:
    from commands.output.figure import FigureOptions, figure

    values = dict(asked)
    if "size" in values:
        values["width"], values["height"] = values.pop("size")
    return figure(drawn, kind, FigureOptions(**values))


@command("export topics", group="observe", when=with_topics, read_only=True)
@click.argument("path", type=NewFile((".json", ".csv")))
@force
def topics(call: Call) -> Report:
    """Write the topics of experts that scans, dossiers and `topics` found, with the evidence."""
    found = call.session.topics()
    if not found.rows:
        raise StateError(str(with_topics(call.bench.view())))
    return _write(call, lambda kind: _topics(found, kind))


def _topics(found: TopicsReport, kind: str) -> str:
    rows = [plain(row) for row in found.rows]
    if kind == ".json":
        return json.dumps({"topics": rows}, ensure_ascii=False, indent=1) + "\n"
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@command("export report", group="history", when=always, read_only=True)
@click.argument("path", type=NewFile((".md",)))
@force
def report(call: Call) -> Report:
    """Write the session as Markdown: the model, its states with their scores, every command."""
    text = session_report(call.bench.view(), call.bench.journal.lines)
    return _write(call, lambda _: text)


@command("export chat", group="chat", read_only=True)
@click.argument("path", type=NewFile(CHAT))
@force
def chat(call: Call) -> Report:
    """Write what was said in this session, with the side that answered: .md or .json."""
    answers = call.bench.answers
    if not answers:
        raise StateError("nothing has been said yet: chat first")
    return _write(call, lambda kind: _conversation(answers, kind))


def _conversation(answers: list[ChatReport], kind: str) -> str:
    if kind == ".json":
        return json.dumps([turn.data() for turn in answers], ensure_ascii=False, indent=1) + "\n"
    parts = []
    for turn in answers:
        ended = "" if turn.finish_reason == "stop" else f", ended by {turn.finish_reason}"
        parts.append(f"**You**\n\n{turn.prompt}\n\n**{turn.side}**{ended}\n\n{turn.text}\n")
    return "\n".join(parts)


COMMANDS: tuple[Command, ...] = (heatmap, topics, report, chat)
