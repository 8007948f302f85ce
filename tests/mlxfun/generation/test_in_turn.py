"""Two answers that take turns on one model are those it gives one after the other, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from decoding_rigs import SIDES, Pair, Tokenizer

from mlxfun.generation.decoder import Decoder, advance
from tests.families import spread


@pytest.mark.parametrize("name", spread(tiny_models.RUNNABLE))
def test_in_turn_each_side_says_what_it_says_alone_by_the_same_experts(rig, name: str) -> None:
    pair = Pair(rig(name))
    alone: dict[str, list[Any]] = {side: [] for side in SIDES}
    for side in SIDES:
        pair.go(side)
        steps = pair.ask(Decoder(pair.r.model, Tokenizer(), pair.r.taps), side, alone[side])
        while advance(steps) is None:
            pass
    assert alone["pruned"] != alone["whole"], "it matters which of them is live"
    decoder = Decoder(pair.r.model, Tokenizer(), pair.r.taps)
    heard: dict[str, list[Any]] = {side: [] for side in SIDES}
    going = {side: pair.ask(decoder, side, heard[side]) for side in SIDES}
    while going:
        for side in tuple(going):
            pair.go(side)
            if advance(going[side]) is not None:
                del going[side]
    assert heard == alone
