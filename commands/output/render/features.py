"""Renderers of sparse autoencoders."""

from __future__ import annotations

from rich.console import Group, RenderableType

from commands.output.render.base import new_table, text
from commands.output.render.inside import token
from mlxfun.tracing.reports import FeatureExample, SaeFeaturesReport, SaeReport

CONTEXT = 48  # characters of an example's text


def trained(report: SaeReport) -> RenderableType:
    """Figures on held-out tokens, and of the model that goes on with what is reconstructed."""
    parts: list[RenderableType] = [text(report.summary())]
    table = new_table("held-out tokens", "error", "L0", "silent", numbers=("error", "L0", "silent"))
    if report.error is not None and report.l0 is not None and report.silent is not None:
        table.add_row(
            f"{report.judged:,}", f"{report.error:.4f}", f"{report.l0:.1f}", f"{report.silent:.1%}"
        )
        parts.append(table)
    rows = (("as it is", report.plain, 0.0), ("reconstruction", report.spliced, report.kl_spliced),
            ("zeros", report.zeros, report.kl_zeros))  # fmt: skip
    if report.plain is not None:
        effect = new_table("in place of the value", "cross-entropy", "KL",
                           numbers=("cross-entropy", "KL"))  # fmt: skip
        for name, entropy, divergence in rows:
            if entropy is not None and divergence is not None:
                effect.add_row(name, f"{entropy:.4f}", f"{divergence:.4f}")
        parts.append(effect)
    said = f"{report.architecture}, k {report.k}, {report.steps:,} steps; written to {report.path}"
    return Group(*parts, text(said, "dim"))


def features(report: SaeFeaturesReport) -> RenderableType:
    """Each feature with its strongest examples, the token in brackets."""
    parts: list[RenderableType] = [text(report.summary())]
    for row in report.rows:
        parts.append(
            text(
                f"feature {row.feature}: active at {row.density:.2%} of tokens, mean {row.mean:.3g}"
            )
        )
        table = new_table("value", "where", "text", numbers=("value",))
        for one in row.examples:
            where = f"{one.sample}:{one.position}"
            table.add_row(f"{one.value:.3g}", where, text(_context(one)))
        parts.append(table)
    return Group(*parts)


def _context(one: FeatureExample) -> str:
    shown = (repr(part)[1:-1] for part in (one.before[-CONTEXT:], one.after[:CONTEXT]))
    before, after = shown
    return f"{before}[{token(one.token, 24)}]{after}"
