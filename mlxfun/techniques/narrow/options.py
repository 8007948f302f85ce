"""Options of narrowing experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlxfun.data.options import DatasetOptions

Method = Literal["obs", "mean", "rms"]
METHODS: tuple[Method, ...] = get_args(Method)
"""How neurons are chosen, see mlxfun.techniques.narrow.neurons."""


@dataclass(frozen=True, slots=True)
class NarrowOptions:
    """How wide experts shall be, by one of three: width, neurons of an expert; fraction, the share
    of its neurons that goes; to_bytes, what the whole model may take as it is saved.

    shared, dense: take the same fraction out of the shared experts, and out of the MLPs of layers
    without experts.

    data: the text that neurons are judged and refitted on, None for that of the last collect.

    refit: fit the output projections to what the layer put out before. requantize: choose single
    neurons of packed experts and pack their output projections anew, instead of taking out whole
    groups of what is packed together and leaving all values that stay exactly as they are.
    """

    width: int | None = None
    fraction: float | None = None
    to_bytes: int | None = None
    method: Method = "obs"
    refit: bool = True
    requantize: bool = False
    shared: bool = False
    dense: bool = False
    data: DatasetOptions | None = None
