"""Reports on what is held of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlxfun.checkpoint.options import Miss
from mlxfun.report import Report
from mlxfun.text import readable_bytes


@dataclass(frozen=True, slots=True)
class ResidencyReport(Report):
    """What is in memory, and what reading the rest has cost since `tokens` was 0.

    capacity: slots of each of `layers` layers, of `experts` experts, and in the mean where `slots`,
    those of each layer, differ. slot_bytes: all slots;
    kept_bytes: everything but experts; whole_bytes: the whole model. hits, misses: experts that were
    in a slot when they were wanted, and those that were not; ahead: of the latter, those that had
    been read ahead; ahead_unused: read ahead for nothing. skipped: choices that were left out.
    tokens: that passed the layers. seconds: with a read under way. A model that is whole in memory
    has no capacity, and nothing is counted; neither has one whose decoder layers are on disk
    (streamed), of which kept_bytes are in memory at rest.
    """

    kind: ClassVar[str] = "residency"
    layers: int
    experts: int
    capacity: int
    slot_bytes: int
    kept_bytes: int
    whole_bytes: int
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    ahead: int = 0
    ahead_unused: int = 0
    skipped: int = 0
    evictions: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    miss: Miss = "read"
    streamed: bool = False
    slots: tuple[int, ...] = ()

    @property
    def held(self) -> str:
        """How many experts of each layer are in slots, as the beginning of a sentence."""
        return f"{some_of(self.slots or (self.capacity,))} of {self.experts} experts a layer"

    @property
    def whole(self) -> bool:
        """Whether all experts are in memory."""
        return self.capacity == 0 and not self.streamed

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that were in a slot, 0.0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read for each token."""
        return self.bytes_read / max(self.tokens, 1)

    @property
    def bandwidth(self) -> float:
        """Bytes a second while something was read."""
        return self.bytes_read / self.seconds if self.seconds > 0 else 0.0

    def summary(self) -> str:
        if self.whole:
            return f"the whole model is in memory, {readable_bytes(self.whole_bytes)}"
        if self.streamed:
            return (
                f"decoder layers are on disk and are read as they run: {readable_bytes(self.kept_bytes)} "
                f"of {readable_bytes(self.whole_bytes)} are in memory, and one layer while it runs"
            )
        held = (
            f"{self.held} in slots, "
            f"{readable_bytes(self.slot_bytes + self.kept_bytes)} of "
            f"{readable_bytes(self.whole_bytes)}"
        )
        if not self.hits + self.misses:
            return f"{held}; nothing has run yet"
        text = (
            f"{held}; {self.hit_rate:.1%} hits, {readable_bytes(self.bytes_per_token)} read a token"
        )
        if self.seconds > 0:
            text += f" at {readable_bytes(self.bandwidth)}/s"
        return text + skipping(self.miss, self.skipped)

    def data(self) -> dict[str, object]:
        found = Report.data(self)
        return found | {
            "hit_rate": self.hit_rate,
            "bytes_per_token": self.bytes_per_token,
            "bandwidth": self.bandwidth,
        }


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One number of slots. bytes: of all slots; tokens_per_second: of decoding."""

    capacity: int
    bytes: int
    tokens_per_second: float
    hit_rate: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class SweepReport(Report):
    """Tokens a second at several numbers of slots. tokens: decoded at each. before: slots a layer
    that the model had, and has again."""

    kind: ClassVar[str] = "residency sweep"
    rows: tuple[SweepRow, ...]
    tokens: int
    before: int

    @property
    def fastest(self) -> SweepRow:
        """The row with the most tokens a second; of equals the one with fewer slots."""
        return max(self.rows, key=lambda row: (row.tokens_per_second, -row.capacity))

    def summary(self) -> str:
        best = self.fastest
        return (
            f"fastest with {best.capacity} experts a layer ({readable_bytes(best.bytes)}): "
            f"{best.tokens_per_second:.1f} tokens/s, {best.hit_rate:.1%} hits; "
            f"load the model with --capacity {best.capacity}"
        )


def some_of(counts: Sequence[int]) -> str:
    """The numbers of slots of layers.

    >>> some_of((4, 4)), some_of((3, 7, 4))
    ('4', '3 to 7')
    """
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def skipping(miss: Miss, skipped: int | None = None) -> str:
    """What a report says where experts are left out; "" where none are."""
    if miss == "read":
        return ""
    many = "" if skipped is None else f", {skipped:,} so far"
    return f"; experts that are not in memory are LEFT OUT{many} (--miss skip)"
