"""Renderers of staged plans."""

from __future__ import annotations

from rich.console import Group, RenderableType

from commands.output.render.base import experts_text, new_table, text, with_notes
from commands.output.render.measurements import refusals
from mlxfun.editing.reports import PlanReport
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.bits.reports import BitsReport
from mlxfun.techniques.distil.reports import DistilReport
from mlxfun.techniques.narrow.reports import NarrowReport
from mlxfun.techniques.router_bias.reports import BoostReport
from mlxfun.techniques.vector_bias.reports import VectorReport
from mlxfun.text import counted, readable_bytes


def plan(report: PlanReport) -> RenderableType:
    """The experts pruned in each layer."""
    lost = report.mass_lost or {}
    columns = ("layer", "pruned", *(("share lost",) if lost else ()), "experts")
    table = new_table(*columns, numbers=("layer", "pruned", "share lost"))
    for layer, experts in report.pruned.items():
        mass = (f"{lost[layer]:.1%}" if layer in lost else "",) if lost else ()
        table.add_row(str(layer), str(len(experts)), *mass, experts_text(experts))
    return with_notes(Group(text(report.summary()), table), report.warnings)


def boost(report: BoostReport) -> RenderableType:
    """The boosts of each layer, and how much of them tokens get."""
    numbers = ("layer", "R^2", "realised")
    table = new_table("layer", "held in", "R^2", "realised", "experts", numbers=numbers)
    for row in report.rows:
        shown = " ".join(f"{expert}{value:+.3g}" for expert, value in row.boosts.items())
        got = f"{row.realised:.2f} +- {row.deviation:.2f}"
        table.add_row(str(row.layer), row.way, f"{row.r2:.3f}", got, shown)
    return with_notes(Group(text(report.summary()), table), report.warnings)


def vectors(report: VectorReport) -> RenderableType:
    """Which bias holds which vector."""
    table = new_table("value", "intervention", "bias", "norm", numbers=("norm",))
    for name, words, path, norm in report.held:
        table.add_row(text(name), text(words), text(path), f"{norm:.3g}")
    return with_notes(Group(text(report.summary()), table), report.warnings)


def narrow(report: NarrowReport) -> RenderableType:
    """How far each layer's output is from what it was, and the experts that saw little text."""
    table = new_table("layer", "error", "experts with too few tokens", numbers=("layer", "error"))
    for layer, error in report.errors.items():
        table.add_row(str(layer), f"{error:.2%}", experts_text(report.scarce.get(layer, ())))
    return with_notes(Group(text(report.summary()), table), report.warnings)


def distil(report: DistilReport) -> RenderableType:
    """KL and perplexity before and after on both texts, and the layers' errors of a local fit."""
    numbers = ("samples", "KL before", "KL after", "perplexity before", "after", "checkpoint")
    table = new_table("text", *numbers, numbers=numbers)
    for name, found in (("held out", report.held_out), ("fitted", report.fitted)):
        before, after = found.before, found.after
        figures = (f"{before.kl:.4f}", f"{after.kl:.4f}", f"{before.perplexity:.2f}")
        rest = (f"{after.perplexity:.2f}", f"{found.perplexity:.2f}")
        table.add_row(name, str(found.samples), *figures, *rest)
    parts: list[RenderableType] = [text(report.summary()), table]
    if report.errors:
        layers = new_table(
            "layer", "error before", "after", numbers=("layer", "error before", "after")
        )
        for layer, (was, now) in report.errors.items():
            layers.add_row(str(layer), f"{was:.2%}", f"{now:.2%}")
        parts.append(layers)
    return with_notes(Group(*parts), report.warnings)


def bits(report: BitsReport) -> RenderableType:
    """Bits by kind of module, and what the same bits for all would be expected to cost."""
    names = ("modules", "least", "mean", "most", "bytes")
    table = new_table("projection", *names, numbers=names)
    for row in report.rows:
        cells = (str(row.modules), str(row.least), f"{row.mean:.1f}", str(row.most))
        table.add_row(text(row.projection), *cells, readable_bytes(row.bytes))
    figures = ("bits for all", "bytes", "expected KL")
    alike = new_table(*figures, numbers=figures)
    for one in report.uniform:
        alike.add_row(str(one.bits), readable_bytes(one.bytes), f"{one.expected_kl:.4f}")
    alike.add_row("as chosen", readable_bytes(report.bytes), f"{report.expected_kl:.4f}")
    return with_notes(Group(text(report.summary()), table, alike), report.warnings)


def ablation(report: AblationReport) -> RenderableType:
    """Strengths by layer, the front of a search, and refusals."""
    parts: list[RenderableType] = [text(report.summary())]
    for name, each in report.strengths.items():
        shown = " ".join(f"{layer}:{value:g}" for layer, value in each.items() if value)
        parts.append(text(f"strength by layer, {name}: {shown or 'none'}", "dim"))
    if report.front:
        names = ("expected", "KL", "perplexity", "harmful refused", "harmless refused")
        table = new_table("", "point", "layer", "position", *names, "strengths", numbers=names)
        for point in report.front:
            count = point.count
            table.add_row(
                "*" if point.number == report.chosen else "",
                str(point.number),
                "own" if point.source_layer < 0 else str(point.source_layer),
                point.position,
                f"{point.expected:.1%}",
                f"{point.kl:.4f}",
                f"x {point.perplexity:.4f}",
                f"{count.harmful} of {count.of_harmful}" if count else "",
                f"{count.harmless} of {count.of_harmless}" if count else "",
                " ".join(f"{k} {v:g}" for k, v in point.strengths.items()),
            )
        speed = (
            f"{counted(report.trials, 'trial', 'trials')} ({report.trials_per_minute:.0f} a minute)"
        )
        parts += [text(f"{speed}, judged by {report.judged}; --choose stages another point"), table]
    if report.refusals is not None:
        parts.append(refusals(report.refusals))
    return with_notes(Group(*parts), report.warnings)
