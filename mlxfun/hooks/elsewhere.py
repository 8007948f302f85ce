"""Where the forwards of a pass may run instead: in other processes that hold the same model.

A pass that only adds describes what it wants of each batch as plain data, a `Task`. Whoever runs
forwards elsewhere (mlxfun.distributed) registers with the model, and `each_forward` asks there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import mlx.nn as nn

from mlxfun.context import Context

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch

_OWNER = "_forwards_elsewhere"


def _nothing(_: Batch) -> Mapping[str, Array]:
    return {}


@dataclass(frozen=True, slots=True)
class Task:
    """What is wanted of each batch. label: of its progress. name: of the pass, see
    mlxfun.distributed.passes; "" for one that runs here only. settings: JSON-able, the same for
    all batches. given: arrays that go along with a batch.
    """

    label: str
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: Callable[[Batch], Mapping[str, Array]] = _nothing


class Elsewhere(Protocol):
    """Runs forwards in other processes."""

    def forwards(
        self, task: Task, todo: Sequence[Batch], ctx: Context
    ) -> Iterator[tuple[Batch, Array]] | None:
        """The result of each batch, in order; None if they have to run here."""


def register(model: nn.Module, elsewhere: Elsewhere | None) -> None:
    """Let `elsewhere` be asked for forwards of `model`; None for nobody."""
    vars(model).pop(_OWNER, None)
    if elsewhere is not None:
        vars(model)[_OWNER] = elsewhere


def elsewhere_of(model: nn.Module) -> Elsewhere | None:
    """Who is asked for forwards of `model`."""
    found: Elsewhere | None = vars(model).get(_OWNER)
    return found
