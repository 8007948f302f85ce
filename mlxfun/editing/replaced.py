"""The tensors that applied edits replaced: kept in memory while there is room, so that undo is a
matter of milliseconds, and else read back from the checkpoint.
"""

from __future__ import annotations

from mlxfun.editing.history import History
from mlxfun.model.delta import Delta, Resident
from mlxfun.model.device.memory import free_bytes

KEPT_SHARE = 0.25
"""Of the memory that is free when an edit is applied, what the tensors it replaced may take."""

READ_RATE = 1e9
"""Bytes a second that a checkpoint is read with, where that was not measured."""


class ReplacedTensors:
    """What is kept for undo although the checkpoint holds it too.

    read_rate: bytes a second that the checkpoint's files are read with.
    """

    def __init__(self, resident: Resident, history: History) -> None:
        self._resident, self._history = resident, history
        self.read_rate = READ_RATE

    def kept_or_released(self, edge: Delta) -> tuple[Delta, int]:
        """The way back over an edit that is being applied, and how many bytes it has to read."""
        size = self._resident.readable_bytes(edge)
        if not size or self._may_keep(size):
            return edge, 0
        return self._resident.released(edge), size

    def _may_keep(self, size: int) -> bool:
        budget, free = self._history.budget, free_bytes()
        if budget is not None and self._history.bytes_held + self.bytes + size > budget:
            return False
        return free is None or size <= KEPT_SHARE * free

    @property
    def bytes(self) -> int:
        """Bytes that are kept."""
        edges = (node.edge for node in self._history.ancestors())
        return sum(self._resident.readable_bytes(edge) for edge in edges if edge is not None)

    def let_go(self) -> int:
        """Leave all of it to the checkpoint; the bytes that it frees."""
        freed = self.bytes
        for node in self._history.ancestors() if freed else ():
            if node.edge is not None:
                node.edge = self._resident.released(node.edge)
        return freed
