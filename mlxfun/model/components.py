"""The parts of a decoder layer that write to the residual stream."""

from __future__ import annotations

from typing import Literal, get_args

Component = Literal["attention", "dense", "shared", "experts"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Attention in the wide sense (linear attention, state space, convolution too), dense feed-forward
parts, shared experts, routed experts."""
