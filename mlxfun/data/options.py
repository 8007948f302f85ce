"""Options of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mlxfun.errors import UsageError
from mlxfun.text import option_words

ExpertSets = dict[int, tuple[int, ...]]

ScanKind = Literal["safety", "domain"]
"""What a scan compares: harmful and benign text, or text of a domain and general text."""

MapMode = Literal["protect", "target"]
"""How a scan's report is used when experts are removed: its experts stay, or go first."""
MAP_MODES: tuple[MapMode, ...] = get_args(MapMode)


Weighted = tuple[tuple[str, float | None], ...]
"""(source, weight) of data sets; a weight of None is one that was not given."""

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".gz", ".zst")
"""Names of data sets that completion offers."""

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
    """Where text comes from. source: a path, a directory, or "demo:NAME".

    mixture: (source, weight) of several sources instead; `source` is then what they are called
    together. Weights are shares of the samples; without any, all lines are taken.
    """

    source: str
    text_key: str = "content"
    max_samples: int | None = None
    max_tokens: int = 512
    seed: int = 0
    mixture: Weighted = ()

    def __post_init__(self) -> None:
        require_seed(self.seed)

    @property
    def parts(self) -> Weighted:
        """(source, weight) of every source; a weight of None is one that was not given."""
        return self.mixture or ((self.source, None),)

    @property
    def words(self) -> tuple[str, ...]:
        """The sources as `--dataset` takes them.

        >>> DatasetOptions("a + b", mixture=(("a", 2.0), ("b", None))).words
        ('a:2', 'b')
        """
        return tuple(s if weight is None else f"{s}:{weight:g}" for s, weight in self.parts)


def source_words(data: DatasetOptions, flag: str = "--dataset") -> list[str]:
    """The sources as words of a command line."""
    return [word for source in data.words for word in (flag, source)]


def dataset_words(data: DatasetOptions) -> list[str]:
    """A data set as words of a command line, with what differs from the defaults."""
    default = DatasetOptions(data.source, mixture=data.mixture)
    return source_words(data) + option_words(data, default)


def mixed(sources: Weighted, **options: Any) -> DatasetOptions:
    """The options for one source or for a mixture of several."""
    if len(sources) == 1 and sources[0][1] is None:
        return DatasetOptions(sources[0][0], **options)
    name = " + ".join(source if w is None else f"{source}:{w:g}" for source, w in sources)
    return DatasetOptions(name, mixture=sources, **options)


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
