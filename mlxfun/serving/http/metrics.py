"""GET /metrics: figures as Prometheus reads them."""

from __future__ import annotations

from mlxfun.serving.ask import Figures


def exposition(figures: Figures) -> str:
    """The figures as text, version 0.0.4 of the format."""
    lines: list[str] = []
    gauges = {
        "requests_in_flight": ("requests that are being answered", figures.in_flight),
        "requests_waiting": ("requests that wait for their turn", figures.waiting),
        "prompt_cache_bytes": ("bytes held for prompts to come", figures.cache_bytes),
    }
    counters = {
        "prompt_tokens_total": ("tokens of prompts", figures.prompt_tokens),
        "prompt_tokens_cached_total": ("tokens of prompts from the cache", figures.cached_tokens),
        "completion_tokens_total": ("tokens generated", figures.completion_tokens),
        "steps_total": ("steps of the model", figures.steps),
    }
    for kind, table in (("gauge", gauges), ("counter", counters)):
        for name, (about, value) in table.items():
            lines += _family(name, about, kind)
            lines.append(f"mlxfun_{name} {value}")
    lines += _family("requests_total", "requests by outcome", "counter")
    for outcome in ("stop", "length", "cancelled", "failed"):
        count = figures.by_outcome.get(outcome, 0)
        lines.append(f'mlxfun_requests_total{{outcome="{outcome}"}} {count}')
    return "\n".join(lines) + "\n"


def _family(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP mlxfun_{name} {about}", f"# TYPE mlxfun_{name} {kind}"]
