"""Identity of weights: a hash that is equal for equal weights, restored by undo, reproduced by
replay.

A state is a Merkle hash over (parameter path, expert row). A row that the checkpoint holds is its
row number and is never read; a row that an edit made is the hash of its bytes, taken once. A
parameter that is as loaded does not appear at all, so an unedited model's state depends on the
checkpoint's identity alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

STATE_DIGITS = 12

RowId = int | str  # a row of the checkpoint, or the hash of an edited row


@dataclass(frozen=True, slots=True)
class Rows:
    """Which row each row of a parameter is. digest: of the identities, computed once."""

    ids: tuple[RowId, ...]
    digest: bytes

    @classmethod
    def of(cls, ids: Sequence[RowId]) -> Rows:
        """Rows with these identities, in this order."""
        return cls(tuple(ids), blake2b(repr(tuple(ids)).encode(), digest_size=16).digest())


Ledger = dict[str, Rows]
"""Parameter path -> rows, for the parameters that differ from the checkpoint."""


def state_id(checkpoint_id: str, ledger: Mapping[str, Rows]) -> str:
    """The short identity of the weights that `ledger` describes over a checkpoint."""
    return state_over(checkpoint_id, describe(ledger))


def describe(ledger: Mapping[str, Rows]) -> bytes:
    """What a state's identity says about weights, whatever the checkpoint is called."""
    return b"".join(path.encode() + ledger[path].digest for path in sorted(ledger))


def state_over(checkpoint_id: str, described: bytes) -> str:
    """`state_id` of weights as `describe` gives them."""
    tree = blake2b(checkpoint_id.encode() + described, digest_size=16)
    return tree.hexdigest()[:STATE_DIGITS]
