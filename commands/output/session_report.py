"""The session as a Markdown report: model, statistics, states with scores, commands."""

from __future__ import annotations

from collections.abc import Sequence

from commands.conditions import steering_in_force
from mlxfun.editing.reports import HistoryReport
from mlxfun.session.reports import InfoReport, SessionView
from mlxfun.text import readable_bytes


def session_report(view: SessionView, lines: Sequence[str]) -> str:
    """The report as Markdown. lines: the session as a recording holds it."""
    parts = ["# Session report"]
    if view.model is not None:
        parts += ["## Model", _model(view.model)]
    if view.heat is not None and view.heat.samples:
        parts.append(f"## Statistics\n\n{view.heat.samples} samples, {view.heat.tokens:,} tokens.")
    if view.history is not None:
        parts += ["## States", _states(view.history)]
    if view.plan is not None:
        parts += ["## Staged, not applied", view.plan.summary()]
        if view.scores is not None:
            parts.append(view.scores.summary())
    if view.steering is not None and (steering_in_force(view) or view.steering.interventions):
        parts += ["## Steering in force", view.steering.summary()]
    parts += ["## Commands", "```\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _model(model: InfoReport) -> str:
    rows = {
        "model": model.model_id,
        "architecture": model.model_type,
        "MoE layers": f"{model.moe_layers} of {model.decoder_layers}",
        "experts": f"{model.experts_kept} of {model.experts} a layer, top-{model.top_k}"
        if model.moe_layers
        else "none",
        "parameters": f"{model.parameters:,}",
        "size": f"{readable_bytes(model.checkpoint_bytes)} ({model.quantization or model.dtype})",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items())


def _states(history: HistoryReport) -> str:
    head = "| node | from | state | command | perplexity | KL | bytes held |\n" + "|---" * 7 + "|"
    rows = []
    for node in history.nodes:
        here = " (here)" if node.id == history.current else ""
        perplexity, kl = (node.scores.get(name) for name in ("perplexity", "kl_mean"))
        rows.append(
            f"| {node.id}{here} | {'' if node.parent is None else node.parent} | {node.state} | "
            f"`{_cell(node.command)}` | {'' if perplexity is None else f'{perplexity:.3f}'} | "
            f"{'' if kl is None else f'{kl:.4f}'} | {readable_bytes(node.bytes)} |"
        )
    return "\n".join([head, *rows])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
