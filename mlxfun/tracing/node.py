"""Names as Python attributes: `model.layers[3].attn.output`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mlxfun.errors import UsageError
from mlxfun.tracing import interventions
from mlxfun.tracing.axes import Positions
from mlxfun.tracing.names import Names


class UnknownName(UsageError, AttributeError):
    """A name that leads to no value of the model; also what `hasattr` expects."""


class Sink(Protocol):
    """Who is told what is saved and what is changed."""

    def save(
        self, name: str, positions: Positions | None = None, heads: Sequence[int] | None = None
    ) -> Any: ...
    def edit(self, name: str, change: Any) -> None: ...


class Node:
    """A name, or the beginning of one. Attributes and indices lead further; `save` and assignment
    ask the trace for the value."""

    __slots__ = ("_name", "_names", "_sink")
    _name: str
    _names: Names
    _sink: Sink

    def __init__(self, names: Names, sink: Sink, name: str) -> None:
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_sink", sink)
        object.__setattr__(self, "_name", name)

    def save(self, positions: Positions | None = None, heads: Sequence[int] | None = None) -> Any:
        """Save the value: a Saved, a list of them where the name is of several layers.

        positions: of each prompt's own tokens, -1 the last; all by default. heads: in attention.
        """
        return self._sink.save(self._name, positions, heads)

    def _beyond(self, more: str) -> str:
        name = f"{self._name}.{more}" if self._name else more
        if not self._names.leads_somewhere(name):
            raise UnknownName(self._names.unknown(name))
        return name

    def __getattr__(self, attribute: str) -> Node:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Node(self._names, self._sink, self._beyond(attribute))

    def __setattr__(self, attribute: str, change: Any) -> None:
        self._sink.edit(self._beyond(attribute), change)

    def __getitem__(self, index: Any) -> Node:
        return Node(self._names, self._sink, self._beyond(self._indexed(index)))

    def __setitem__(self, index: Any, change: Any) -> None:
        self._sink.edit(self._beyond(self._indexed(index)), change)

    def _indexed(self, index: Any) -> str:
        if isinstance(index, slice):
            chosen = range(self._names.layers)[index]
            if self._name != "layers" or not len(chosen):
                raise UnknownName(f"{self._name}[{index.start}:{index.stop}] names no layers")
            return ",".join(map(str, chosen))
        if isinstance(index, int) and index < 0 and self._name == "layers":
            index += self._names.layers
        return str(index)

    def __iadd__(self, vector: Any) -> Any:
        return interventions.add_vector(vector)

    def __isub__(self, vector: Any) -> Any:
        return interventions.add_vector(vector, -1.0)

    def __imul__(self, factor: Any) -> Any:
        if isinstance(factor, int | float):
            return interventions.scale(factor)
        return interventions.Intervention("function", function=lambda x: x * factor)

    def __repr__(self) -> str:
        return f"<{self._name}>"
