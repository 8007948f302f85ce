"""The statistics and the steering of a session as mlx_fun's server writes them; layers are positions
among the MoE layers there. For the model's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxfun.session.session import Session


def stats_json(session: Session) -> dict[str, Any]:
    """The statistics in hand, zeros without any, as mlx_fun's server writes them."""
    stats = session.traffic_stats()
    sums = {name: stats.sums[name].tolist() for name in ("freq", "weighted_freq_sum")}
    sums |= {name: stats.sums[name].tolist() for name in ("reap_sum", "ean_sum")}
    layers, experts = stats.shape
    return {
        **sums,
        "reap_count": stats.sums["freq"].tolist(),
        "num_layers": layers,
        "num_experts": experts,
        "request_count": stats.samples,
        "token_count": stats.tokens,
        "total_samples": float(stats.sums["freq"].sum()),
        "computed_scores": {
            "reap": stats.score("reap").tolist(),
            # What mlx_fun calls ean is the mean, which is man here.
            "ean": stats.score("man").tolist(),
            "freq": stats.score("freq").tolist(),
            "weighted_freq": stats.score("weighted_freq").tolist(),
        },
    }


def info_json(session: Session) -> dict[str, Any]:
    """What is counted, in short."""
    stats = session.traffic_stats()
    layers, experts = stats.shape
    return {
        "num_layers": layers,
        "num_experts": experts,
        "request_count": stats.samples,
        "token_count": stats.tokens,
        "steering_active": not session.editor.steering.empty,
    }


def steering_json(session: Session) -> tuple[bool, dict[str, Any]]:
    """Whether anything is steered, and the steering in force by position."""
    report = session.editor.steering.report()
    place = {layer: position for position, layer in enumerate(session.anatomy.indices)}
    return not session.editor.steering.empty, {
        "deactivate": {str(place[ly]): list(some) for ly, some in report.deactivated.items()},
        "activate": {str(place[ly]): list(some) for ly, some in report.activated.items()},
        "mask_value": report.mask_value,
        "boost_value": report.boost_value,
    }
