"""What ranks exchange arrives whole or not at all."""

from __future__ import annotations

from hashlib import blake2b

import pytest

from mlxfun.distributed.ranks import DIGEST, Ranks, _whole
from mlxfun.errors import StateError


def test_a_rank_alone_exchanges_with_nobody() -> None:
    assert Ranks(0, ["127.0.0.1:1"], "ring").gather(b"sums") == [b"sums"]


def test_what_did_not_arrive_whole_is_refused() -> None:
    """A ring whose neighbour is gone hands out what was in its buffers, without an error."""
    sent = blake2b(b"sums", digest_size=DIGEST).digest() + b"sums"
    assert _whole(sent) == b"sums"
    for broken in (sent[:-1], sent[:-1] + b"x", bytes(len(sent)), b""):
        with pytest.raises(StateError, match="did not arrive whole"):
            _whole(broken)
