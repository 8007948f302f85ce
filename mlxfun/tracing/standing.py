"""Standing interventions: in force in every forward until they are taken away.

They are part of the steering (mlxfun.steering.rules), so they are steps of the history, and nothing
that was computed under other ones is taken for theirs. They act at every position, since a
conversation has none that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from mlxfun.errors import UsageError
from mlxfun.tracing.interventions import Intervention
from mlxfun.tracing.names import Point
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.run import Run
from mlxfun.tracing.trace import expanded

REFUSED = {
    "function": "a function cannot be written down",
    "noise": "noise would be the same at every step",
}


@dataclass(frozen=True, slots=True)
class Placed:
    """An intervention and where it acts. name: as given, `*` and 2-5 for layers. source: the file
    that its vector is from, "" for none."""

    name: str
    change: Intervention
    source: str = ""

    @property
    def key(self) -> str:
        """Identity, of the values of its array too."""
        digest = blake2b(f"{self.name} {self.change.described}".encode(), digest_size=6)
        for part in _all(self.change):
            numbers = repr((part.kind, part.numbers, part.experts, part.heads))
            digest.update(numbers.encode())
            if part.array is not None:
                digest.update(np.array(part.array.astype(mx.float32)).tobytes())
        return digest.hexdigest()

    @property
    def described(self) -> str:
        """In words: what, and where."""
        return f"{self.change.described} at {self.name}"


def _all(change: Intervention) -> list[Intervention]:
    return [change, *(inner for part in change.parts for inner in _all(part))]


def require_standing(parts: Parts, placed: Placed) -> None:
    """Raise UsageError for an intervention that cannot stand, or a name that leads nowhere."""
    for change in _all(placed.change):
        if change.kind in REFUSED:
            raise UsageError(f"{change.described} cannot stay in force: {REFUSED[change.kind]}")
        if change.positions is not None:
            raise UsageError(
                f"{change.described} cannot stay in force: a conversation has no fixed positions; "
                "leave the positions out"
            )
    for point, _ in _edits(parts, [placed]):
        if point.route == "choice" and parts.experts(point.layer or 0).layer.experts_list:
            raise UsageError(
                f"{placed.described} cannot stay in force: {parts.map.model_type} calls its experts "
                "one by one, and what is shown of its routing would not follow; use it in a trace"
            )
    Run(parts, _edits(parts, [placed]), [])  # refuses what cannot be hooked


def _edits(parts: Parts, placed: Sequence[Placed]) -> list[tuple[Point, Intervention]]:
    return [
        (point, change)
        for one in placed
        for name, change in expanded(one.name, one.change)
        for point in parts.names.several(name)
    ]


class Standing:
    """Puts standing interventions in force on one model. known: {key: one} of all that ever stood."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._keys: list[str] = []
        self._run: Run | None = None
        self.known: dict[str, Placed] = {}

    def install(self, placed: tuple[Placed, ...]) -> None:
        """Exactly these from the next forward on; the present ones as they are if they are these."""
        keys = [one.key for one in placed]
        if keys == self._keys:
            return
        self.known |= dict(zip(keys, placed, strict=True))
        run = Run(self.parts, _edits(self.parts, placed), []) if placed else None
        if self._run is not None:
            self._run.__exit__(None, None, None)
        self._keys, self._run = keys, run
        if run is not None:
            run.__enter__()
