"""Broken lines of a data set: left out and counted while they are few, an error when they are many.

A run over night shall not end at the third broken line of 100,000, and a file of another kind, or
read under a wrong key, shall not be taken for a data set of which most happens to be broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlxfun.data.lines import BrokenLine
from mlxfun.errors import DatasetError
from mlxfun.tally import Tally

ONE_IN = 10
"""Up to one in so many lines may be broken."""


class BrokenLines:
    """The broken lines among those that are worked on one after the other."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._first: BrokenLine | None = None
        self.count = 0

    @contextmanager
    def counted(self, source: str) -> Iterator[None]:
        """Work on one line of `source`: a BrokenLine ends the block, and is counted."""
        try:
            yield
        except BrokenLine as error:
            self.count += 1
            self._first = self._first or error
            self._tally.part(source).refuse(error.reason, error.where)

    def require_few(self, tried: int) -> None:
        """Raise DatasetError, naming the first, where more than one in ten of `tried` are broken."""
        if self._first is None or self.count * ONE_IN <= tried:
            return
        if tried == 1:
            raise self._first
        raise DatasetError(
            f"{self._first} ({self.count:,} of {tried:,} lines are broken; up to 1 in {ONE_IN} "
            "are left out and counted)"
        ) from self._first
