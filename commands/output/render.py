"""Renders reports as text, with Rich.

Text that comes from files, models and users is shown as it is: markup in it is not obeyed, and
control characters, which could drive the terminal, are made visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from commands.guides.report import GuideReport
from commands.output.guide_page import GuidePage
from mlxfun.calibration.reports import CombineReport, DiffReport, RankReport, StatsReport, WhyReport
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.editing.reports import HistoryReport, PlanReport
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, RefusalReport
from mlxfun.generation.reports import ABReport, ChatReport
from mlxfun.report import Report
from mlxfun.scans.reports import DossierReport, ScanReport
from mlxfun.session.reports import InfoReport, LayersReport, SmokeReport
from mlxfun.session.variants import RecipeReport
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.router_bias.reports import BoostReport
from mlxfun.text import counted, readable_bytes

SHOWN_SCANNED = 20
SHOWN_PRUNED = 12  # experts of one layer listed by number before "and n more"


def safe(text: str) -> str:
    """`text` without the power to drive a terminal: control characters become pictures of them.

    >>> safe("a\\x1b[31mb")
    'a␛[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else _picture(c) for c in text)


def _picture(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # Unprintable but harmless (narrow spaces, joiners in emoji) stay; C1 controls, surrogates and
    # the characters that turn the direction of the whole line do not.
    dangerous = 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in _DIRECTION
    return "\ufffd" if dangerous else char


_DIRECTION = frozenset((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def text(content: str, style: str = "") -> Text:
    """Text as it is, whatever looks like markup in it."""
    return Text(safe(content), style)


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    # No box: lines are read out by screen readers, and cost width.
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def _pairs(rows: Iterable[tuple[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        if value is not None:
            table.add_row(text(name), text(str(value)))
    return table


def _with_notes(head: RenderableType, notes: Iterable[str]) -> RenderableType:
    lines = [text(f"note: {note}", "yellow") for note in notes]
    return Group(head, *lines) if lines else head


def experts_text(experts: Sequence[int], most: int = SHOWN_PRUNED) -> str:
    """Expert numbers, the end left out when there are many.

    >>> experts_text((1, 2, 5), most=2)
    '1 2 and 1 more'
    """
    shown = " ".join(str(e) for e in experts[:most])
    return shown + (f" and {len(experts) - most} more" if len(experts) > most else "")


@singledispatch
def render(report: Report) -> RenderableType:
    """A report for a person. Falls back to its one sentence."""
    return text(report.summary())


@render.register
def _guide(report: GuideReport) -> RenderableType:
    return GuidePage(report.name)


@render.register
def _info(report: InfoReport) -> RenderableType:
    kept = f"{report.experts_kept} of {report.experts}"
    experts = kept if report.experts_kept != report.experts else str(report.experts)
    limit = f" of {readable_bytes(report.memory_limit)}" if report.memory_limit else ""
    rows: list[tuple[str, Any]] = [
        ("model", report.model_id),
        ("source", report.source),
        ("type", report.model_type),
        ("layers", f"{report.decoder_layers}, {report.moe_layers} of them MoE"),
        ("experts", f"{experts} per layer, top-{report.top_k}, {report.router} router"),
        ("groups", report.groups if report.groups > 1 else None),
        ("shared experts", report.shared_experts or None),
        ("parameters", f"{report.parameters:,}"),
        ("size", f"{readable_bytes(report.bytes)} ({report.dtype})"),
        ("quantisation", report.quantization),
        ("checkpoint", readable_bytes(report.checkpoint_bytes)),
        ("device", report.device),
        ("memory in use", f"{readable_bytes(report.memory_active)}{limit}"),
        ("digest", report.digest),
    ]
    return _with_notes(_pairs(rows), report.notes)


@render.register
def _layers(report: LayersReport) -> RenderableType:
    numbers = ("layer", "experts", "kept", "top-k", "groups", "shared")
    table = _table(
        *("layer", "router", "score", "experts", "kept", "top-k", "groups", "shared", "bias"),
        "path",
        numbers=numbers,
    )
    for row in report.rows:
        cells = (row.layer, row.router, row.score, row.experts, row.kept, row.top_k)
        more = (row.groups, row.shared_experts, "yes" if row.selection_bias else "no", row.path)
        table.add_row(*(text(str(c)) for c in (*cells, *more)))
    return Group(text(report.summary()), table)


@render.register
def _stats(report: StatsReport) -> RenderableType:
    table = _table("least", "reap_sum", "most", "reap_sum")
    for low, high in zip(report.least, report.most, strict=False):
        table.add_row(*(text(cell) for row in (low, high) for cell in _scored(row)))
    return Group(text(report.summary()), table) if report.least else text(report.summary())


def _scored(row: tuple[int, int, float]) -> tuple[str, str]:
    layer, expert, score = row
    return f"{layer}:{expert}", f"{score:.4g}"


@render.register
def _diff(report: DiffReport) -> RenderableType:
    metrics = _table("metric", "rank correlation", "lowest quarter in common")
    for name, value in report.rank_correlation.items():
        metrics.add_row(text(name), f"{value:.3f}", f"{report.overlap[name]:.0%}")
    table = _table("expert", "share in A", "share in B", numbers=("share in A", "share in B"))
    for row in report.rows:
        table.add_row(f"{row.layer}:{row.expert}", f"{row.share_a:.2%}", f"{row.share_b:.2%}")
    return _with_notes(Group(text(report.summary()), metrics, table), report.notices)


@render.register
def _rank(report: RankReport) -> RenderableType:
    table = _table("expert", "ranks", "sum", numbers=("sum",))
    for row in report.rows:
        table.add_row(f"{row.layer}:{row.expert}", " ".join(map(str, row.ranks)), str(row.total))
    goes = _pairs((f"layer {k}", experts_text(v)) for k, v in report.chosen.items() if v)
    return _with_notes(Group(text(report.summary()), goes, table), report.notices)


@render.register
def _combine(report: CombineReport) -> RenderableType:
    return _with_notes(text(report.summary()), report.notices)


@render.register
def _plan(report: PlanReport) -> RenderableType:
    lost = report.mass_lost or {}
    columns = ("layer", "go", *(("mass lost",) if lost else ()), "experts that go")
    table = _table(*columns, numbers=("layer", "go", "mass lost"))
    for layer, experts in report.pruned.items():
        mass = (f"{lost[layer]:.1%}" if layer in lost else "",) if lost else ()
        table.add_row(str(layer), str(len(experts)), *mass, experts_text(experts))
    return _with_notes(Group(text(report.summary()), table), report.warnings)


@render.register
def _boost(report: BoostReport) -> RenderableType:
    numbers = ("layer", "R^2", "realised")
    table = _table("layer", "held in", "R^2", "realised", "experts", numbers=numbers)
    for row in report.rows:
        shown = " ".join(f"{expert}{value:+.3g}" for expert, value in row.boosts.items())
        got = f"{row.realised:.2f} +- {row.deviation:.2f}"
        table.add_row(str(row.layer), row.way, f"{row.r2:.3f}", got, shown)
    return _with_notes(Group(text(report.summary()), table), report.warnings)


@render.register
def _scan(report: ScanReport) -> RenderableType:
    names = ("composite", "frequency", "gate", "q", "stability")
    answers = any(row.risk_difference is not None for row in report.rows)
    columns = (*names, *(("risk difference",) if answers else ()))
    table = _table("expert", *columns, numbers=columns)
    for row in report.rows[:SHOWN_SCANNED]:
        shown = [f"{row.composite:+.3f}", f"{row.differential_freq:+.3f}"]
        shown += [f"{row.differential_activation:+.4f}", f"{row.q:.2g}", f"{row.stability:.2f}"]
        if answers:
            shown.append("" if row.risk_difference is None else f"{row.risk_difference:+.3f}")
        table.add_row(f"{row.layer}:{row.expert}", *shown)
    parts: list[RenderableType] = [text(report.summary())]
    if report.rows:
        parts.append(table)
    if len(report.rows) > SHOWN_SCANNED:
        parts.append(text(f"and {len(report.rows) - SHOWN_SCANNED} more in the file", "dim"))
    return _with_notes(Group(*parts), report.notices)


@render.register
def _steer(report: SteerReport) -> RenderableType:
    rows: list[tuple[str, Any]] = []
    if report.rule == "additive" and (report.activated or report.deactivated):
        rows.append(
            ("added", f"{report.boost_value:+g} activated, {report.mask_value:+g} deactivated")
        )
    for name, sets in (("activated", report.activated), ("deactivated", report.deactivated)):
        rows += [(f"{name}, layer {k}", experts_text(v)) for k, v in sets.items()]
    for layer, levels in report.levels.items():
        rows.append((f"level, layer {layer}", ", ".join(f"{e} {x:+g}" for e, x in levels.items())))
    for use in report.maps:
        rows.append(
            (f"{use.kind} report", f"{use.path}, {use.mode}: {len(use.cells)} of its experts")
        )
    return _with_notes(Group(text(report.summary()), _pairs(rows)), report.notices)


@render.register
def _evaluate(report: EvaluateReport) -> RenderableType:
    # Narrow titles and two decimals: the table has to fit beside the heatmap.
    names = ("ppl", "95 %", "ratio", "tokens")
    table = _table("data set", *names, numbers=names)
    rows = dict(report.perplexity)
    if len(rows) == 2:
        rows.pop("all", None)  # of one set it would be the same again
    for name, value in rows.items():
        low, high = report.interval.get(name, (math.nan, math.nan))
        base = report.baseline.get(name)
        tokens = report.tokens if name == "all" else report.tokens_per_set.get(name)
        table.add_row(
            text(name),
            f"{value:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{value / base:.3f}" if base else "",
            f"{tokens:,}" if tokens is not None else "",
        )
    parts: list[RenderableType] = [text(report.summary()), table]
    for sample in report.samples:
        parts += [text(f"> {sample.prompt}", "dim"), text(sample.text)]
    kept = report.subject == "current"
    steered = "steering is no part of the weights: " + (
        "the history keeps no score of this" if kept else "guardrails of apply measure without it"
    )
    notes = (*report.notes, *((steered,) if report.steered else ()))
    return _with_notes(Group(*parts), notes)


@render.register
def _chat(report: ChatReport) -> RenderableType:
    return Group(text(report.text), text(report.summary(), "dim"))


@render.register
def _ab(report: ABReport) -> RenderableType:
    parts: list[RenderableType] = [text(report.summary())]
    for answer in (report.base, report.candidate):
        parts += [text(f"{answer.label} ({answer.finish_reason})", "bold"), text(answer.text)]
    return Group(*parts)


@render.register
def _history(report: HistoryReport) -> RenderableType:
    table = _table("", "node", "parent", "state", "held", "command", "scores", numbers=("node",))
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


@render.register
def _recipe(report: RecipeReport) -> RenderableType:
    numbers = ("size", "KL", "x checkpoint")
    table = _table("", "variant", *numbers, numbers=numbers)
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


def _dossier(report: DossierReport) -> RenderableType:
    tokens = _table("token", "served", "of", numbers=("served", "of"))
    for row in report.top_tokens:
        tokens.add_row(text(repr(row.text)), str(row.served), str(row.of))
    notes = [report.note] if report.note else []
    return _with_notes(Group(text(report.summary()), render(report.why), tokens), notes)


@render.register
def _compare(report: CompareReport) -> RenderableType:
    # One column a state: it fits a narrow panel, and the pairs to be compared stand together.
    both = (report.a, report.b)
    table = _table("")
    for f in both:
        table.add_column(text(f"{f.node} {f.name}"))
    lines: tuple[tuple[str, list[str]], ...] = (
        ("perplexity", [f"{f.perplexity:.3f}" for f in both]),
        ("x checkpoint", [f"{f.ratio:.3f}" for f in both]),
        ("KL", ["" if f.kl_mean is None else f"{f.kl_mean:.4f}" for f in both]),
        ("size", [readable_bytes(f.bytes) for f in both]),
        ("experts", [str(f.experts) for f in both]),
        ("work kept", ["" if f.work is None else f"{f.work:.1%}" for f in both]),
    )
    for name, cells in lines:
        table.add_row(name, *cells)
    rows: list[tuple[str, Any]] = []
    for node, sets in ((report.a.node, report.only_a), (report.b.node, report.only_b)):
        rows += [(f"only in {node}, layer {ly}", experts_text(e)) for ly, e in sets.items()]
    parts: list[RenderableType] = [text(report.summary()), table, _pairs(rows)]
    for one, other in zip(report.a.samples, report.b.samples, strict=False):
        parts += [text(f"> {one.prompt}", "dim"), text(f"{report.a.node}: {one.text}")]
        parts.append(text(f"{report.b.node}: {other.text}"))
    return Group(*parts)


@render.register
def _save(report: SaveReport) -> RenderableType:
    rows: list[tuple[str, Any]] = [
        ("saved", report.path),
        (
            "size",
            f"{readable_bytes(report.bytes)} in {counted(len(report.files), 'file', 'files')}",
        ),
        ("experts", f"{report.experts} per layer"),
        ("quantisation", report.quantization),
        *((f"check {name}", outcome) for name, outcome in report.gate.items()),
    ]
    return _pairs(rows)


@render.register
def _smoke(report: SmokeReport) -> RenderableType:
    return Group(text(report.summary()), _pairs(report.checks.items()), text(report.text))


@render.register
def _why(report: WhyReport) -> RenderableType:
    table = _table("metric", "score", f"rank of {report.of}", numbers=("score",))
    for name, score in report.scores.items():
        table.add_row(text(name), f"{score:.6g}", str(report.ranks.get(name, "")))
    return Group(text(report.summary()), table)


@render.register
def _ablation(report: AblationReport) -> RenderableType:
    parts: list[RenderableType] = [text(report.summary())]
    for name, each in report.strengths.items():
        shown = " ".join(f"{layer}:{value:g}" for layer, value in each.items() if value)
        parts.append(text(f"strength by layer, {name}: {shown or 'none'}", "dim"))
    if report.front:
        names = ("expected", "KL", "harmful refused", "harmless refused")
        table = _table("", "point", "layer", "position", *names, "strengths", numbers=names)
        for point in report.front:
            count = point.count
            table.add_row(
                "*" if point.number == report.chosen else "",
                str(point.number),
                str(point.source_layer),
                point.position,
                f"{point.expected:.1%}",
                f"{point.kl:.4f}",
                f"{count.harmful} of {count.of_harmful}" if count else "",
                f"{count.harmless} of {count.of_harmless}" if count else "",
                " ".join(f"{k} {v:g}" for k, v in point.strengths.items()),
            )
        speed = (
            f"{counted(report.trials, 'trial', 'trials')} ({report.trials_per_minute:.0f} a minute)"
        )
        parts += [text(f"{speed}, judged by {report.judged}; --choose stages another point"), table]
    if report.refusals is not None:
        parts.append(_refusals(report.refusals))
    return _with_notes(Group(*parts), report.warnings)


@render.register
def _refusals(report: RefusalReport) -> RenderableType:
    table = _table("", "harmful refused", "harmless refused")
    for name, count in ((report.reference, report.before), (report.subject, report.after)):
        harmful = f"{count.harmful} of {count.of_harmful}"
        table.add_row(name, harmful, f"{count.harmless} of {count.of_harmless}")
    parts: list[RenderableType] = [text(report.summary()), table]
    for prompt, before, after in report.examples:
        shown = (f"> {prompt}", "dim"), (f"{report.reference}: {before}", "")
        parts += [text(*line) for line in (*shown, (f"{report.subject}: {after}", ""))]
    return _with_notes(Group(*parts), report.notices)
