"""Options of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxfun.errors import UsageError

ExpertSets = dict[int, tuple[int, ...]]


SEEDS = range(2**63)
"""What NumPy's generators and MLX's take."""


def require_seed(seed: int) -> int:
    """`seed` itself. Raises UsageError for one that some generator would not take."""
    if seed not in SEEDS:
        shown = seed if abs(seed) < 10**20 else "that is given"
        raise UsageError(f"the seed {shown} must be at least 0 and below 2^63")
    return seed


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """Where text comes from. source: a path, a directory, or "demo:NAME"."""

    source: str
    text_key: str = "content"
    max_samples: int | None = None
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """A data set of the Hub and what is kept of it.

    where: (column, value) pairs that must all hold, compared as text. Without text_column,
    `messages`, then `prompt` with `completion`, then `text` is taken. Lengths in characters.
    """

    source: str
    output: Path
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    text_column: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    min_chars: int | None = None
    max_chars: int | None = None
    max_samples: int | None = None
