"""The report on what fits how. Imports nothing heavy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mlxfun.memory.reports import some_of
from mlxfun.report import Report
from mlxfun.text import counted, readable_bytes

Fit = Literal["whole", "partly", "streamed", "no"]
"""How a model fits: in memory; with some experts there; layer by layer; not at all."""


@dataclass(frozen=True, slots=True)
class Level:
    """A prune. share: of the experts that go; left: a layer. bytes: of the model after it."""

    share: float
    left: int
    bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class FitReport(Report):
    """What a model needs, from the headers of its files.

    memory: bytes it may take. parts: {part: bytes}, see mlxfun.model.anatomy.stored_names. whole:
    all of it; kept: without experts. expert_bytes: of one expert in every layer; active: bytes that
    a token passes. capacity: experts a layer that fit, 0 for too few; slots: those of each layer, as
    recorded use divides them; held: bytes with so many. bits: that 16-bit weights are held in, 32 on
    MLX's CPU backend; otherwise: bytes of the whole model in the other of these, None where that is
    the same, as it is for packed weights.
    hit_rate: share of choices that find their expert in memory; measured_use: from recorded routing,
    else as if all experts were used alike. bandwidth: bytes a second of the disk; tokens_per_second:
    the most that it allows. streamed: bytes of a pass layer by layer. levels: what prunes would need.
    """

    kind: ClassVar[str] = "plan of memory"
    model: str
    memory: int
    bandwidth: float | None
    parts: Mapping[str, int]
    whole: int
    kept: int
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    active: int
    fit: Fit
    capacity: int
    held: int
    hit_rate: float | None
    measured_use: bool
    tokens_per_second: float | None
    streamed: int
    levels: tuple[Level, ...]
    slots: tuple[int, ...] = ()
    bits: Literal[16, 32] = 16
    otherwise: int | None = None

    @property
    def note(self) -> str:
        """In how many bits weights of 16 are counted, "" where there are none."""
        if self.otherwise is None:
            return ""
        other = readable_bytes(self.otherwise)
        if self.bits == 32:
            return (
                "16-bit weights are counted in 32 bits, as MLX's CPU backend holds them; on a GPU the "
                f"whole model takes {other}"
            )
        return (
            "16-bit weights are counted as they are, as a GPU holds them; on MLX's CPU backend the "
            f"whole model takes {other}"
        )

    @property
    def some(self) -> str:
        """How many experts of each layer fit, as the beginning of a sentence."""
        return f"{some_of(self.slots or (self.capacity,))} of {self.experts} experts"

    @property
    def _how(self) -> str:
        uneven = len(set(self.slots)) > 1
        return "--resident auto --profile FILE" if uneven else f"--capacity {self.capacity}"

    def summary(self) -> str:
        sizes = f"{readable_bytes(self.whole)} in {readable_bytes(self.memory)}"
        if self.fit == "whole":
            return f"{self.model} fits whole: {sizes}"
        if self.fit == "partly":
            return (
                f"{self.model} does not fit whole ({sizes}), with {self.some} a layer it does: "
                f"load {self.model} {self._how}"
            )
        if self.fit == "streamed":
            return (
                f"{self.model} only fits layer by layer ({sizes}): that takes "
                f"{readable_bytes(self.streamed)}"
            )
        return f"{self.model} does not fit in any way: {sizes}; {self._least}"

    @property
    def _least(self) -> str:
        return f"one layer at a time takes {readable_bytes(self.streamed)}"


Origin = Literal["included", "recent", "Hub cache"]
"""Where a model on this machine is known from."""


FITS: dict[Fit, str] = {
    "whole": "fits whole",
    "partly": "with some experts (--resident auto)",
    "streamed": "layer by layer (--resident none)",
    "no": "does not fit",
}
"""What is said of each way to fit."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded without a download. source: what `load` takes. bytes: it would
    take in memory. fit: None where that is not known; problem: why it cannot be looked at."""

    source: str
    origin: Origin
    bytes: int
    fit: Fit | None
    problem: str

    @property
    def words(self) -> str:
        """How it fits, or why that is not known."""
        return self.problem or ("" if self.fit is None else FITS[self.fit])

    @property
    def line(self) -> str:
        """The command line that loads it in the way that it fits.

        >>> LocalModel("big one", "recent", 1, "partly", "").line
        "load 'big one' --resident auto"
        """
        how = {"partly": ["--resident", "auto"], "streamed": ["--resident", "none"]}
        more = how.get(self.fit, []) if self.fit is not None else []
        return shlex.join(["load", self.source, *more])


@dataclass(frozen=True, slots=True)
class ModelsReport(Report):
    """The models on this machine. memory: bytes that one may take, None for unknown."""

    kind: ClassVar[str] = "models"
    models: tuple[LocalModel, ...]
    memory: int | None

    def summary(self) -> str:
        whole = sum(model.fit == "whole" for model in self.models)
        room = "" if self.memory is None else f" of {readable_bytes(self.memory)}"
        return (
            f"{counted(len(self.models), 'model', 'models')} on this machine, "
            f"{counted(whole, 'fits', 'fit')} whole into memory{room}; load NAME loads one"
        )
