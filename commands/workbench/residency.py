"""The options that say how a model and its caches are held in memory: of `load`, and of the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from commands.types import FilePath, HowMuch, Whole

if TYPE_CHECKING:
    from mlxfun.checkpoint.options import LoadOptions, Miss, PackedCache, Resident

_OPTIONS = (
    click.option(
        "--resident",
        type=HowMuch(),
        metavar="auto|all|none|SIZE",
        help="How much to hold in memory: experts that do not fit are read when they are wanted; "
        "none: layers are read as they run (default: all).",
    ),
    click.option(
        "--scratch",
        type=FilePath(),
        metavar="DIR",
        help="With --resident none: where hidden states and edited tensors go.",
    ),
    click.option(
        "--capacity",
        type=Whole(min=1),
        metavar="N",
        help="Hold N experts of each layer, in place of --resident.",
    ),
    click.option(
        "--profile",
        type=FilePath((".json", ".npz")),
        metavar="FILE",
        help="Hold the experts that a profile, or statistics, say are used most.",
    ),
    click.option(
        "--miss",
        type=click.Choice(["read", "skip"]),
        help="skip leaves out experts that are not in memory, which changes answers "
        "(default: read).",
    ),
    click.option(
        "--read-ahead",
        type=Whole(min=0),
        metavar="N",
        help="Read up to N experts of the next layer before it asks (default: 0).",
    ),
    click.option(
        "--kv-bits",
        type=click.Choice(["4", "8"]),
        help="Pack the KV caches of answers, of chat and of clients, to so many bits.",
    ),
    click.option(
        "--kv-group-size",
        type=click.Choice(["32", "64", "128"]),
        help="With --kv-bits: values that share a scale (default: 64).",
    ),
    click.option(
        "--kv-start",
        type=Whole(min=0),
        metavar="N",
        help="With --kv-bits: pack a cache once it holds N tokens (default: 0). Above 0 clients are "
        "answered one at a time.",
    ),
)
NAMES = (
    "resident", "capacity", "profile", "miss", "read_ahead", "scratch",
    "kv_bits", "kv_group_size", "kv_start",
)  # fmt: skip


def residency_options(function: Any) -> Any:
    """Add the options to a command, or to the program."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class Residency:
    """What the options say; None where they say nothing."""

    resident: str | int | None = None
    capacity: int | None = None
    profile: Path | None = None
    miss: str | None = None
    read_ahead: int | None = None
    scratch: Path | None = None
    kv_bits: str | None = None
    kv_group_size: str | None = None
    kv_start: int | None = None

    @classmethod
    def taken(cls, params: Mapping[str, Any]) -> Residency:
        """From the parameters of a command."""
        return cls(*(params.get(name) for name in NAMES))

    @property
    def words(self) -> list[str]:
        """The same as words of a command line."""
        given = [(name, getattr(self, name)) for name in NAMES]
        return [
            word
            for name, value in given
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def added_to(self, options: LoadOptions) -> LoadOptions:
        """Options of loading with these. Raises UsageError for some that exclude each other."""
        from dataclasses import replace

        from mlxfun.errors import UsageError

        if self.capacity is not None and self.resident is not None:
            raise UsageError(
                f"--capacity {self.capacity} and --resident {self.resident} both say how much to "
                "hold: give one"
            )
        if self.scratch is not None and self.resident != "none":
            raise UsageError(
                "--scratch is for models that are read layer by layer: --resident none"
            )
        partly = self.capacity is not None or self.resident not in (None, "all", "none")
        odd = (
            (self.profile is not None, "--profile"),
            (self.miss == "skip", "--miss"),
            (bool(self.read_ahead), "--read-ahead"),
        )
        if any(given for given, _ in odd) and not partly:
            first = next(name for given, name in odd if given)
            raise UsageError(
                f"{first} is about experts that are not in memory: give --resident auto, a size, or "
                "--capacity with it"
            )
        return replace(
            options,
            resident=cast("Resident", "all" if self.resident is None else self.resident),
            capacity=self.capacity,
            profile=self.profile,
            miss=cast("Miss", self.miss or "read"),
            read_ahead=self.read_ahead or 0,
            scratch=self.scratch,
            kv=self._packed(),
        )

    def _packed(self) -> PackedCache | None:
        from mlxfun.checkpoint.options import PackedCache
        from mlxfun.errors import UsageError

        if self.kv_bits is None:
            given = {"--kv-group-size": self.kv_group_size, "--kv-start": self.kv_start}
            for name, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{name} {value} is about packed caches: give --kv-bits 4 or 8"
                    )
            return None
        return PackedCache(int(self.kv_bits), int(self.kv_group_size or 64), self.kv_start or 0)
