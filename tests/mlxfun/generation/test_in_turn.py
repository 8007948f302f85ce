"""Two answers that take turns on one model are those it gives one after the other, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from rigs import Rig

from mlxfun.generation.decoder import Decoder, Steps, advance
from mlxfun.generation.options import GenerateOptions

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]
DRAWN = GenerateOptions(max_tokens=10, temperature=0.8, seed=5)
SIDES = ("pruned", "whole")


class Words:
    """A detokenizer: every token is a word."""

    def reset(self) -> None:
        self.tokens: list[int] = []

    def add_token(self, token: int) -> None:
        self.tokens.append(token)

    def finalize(self) -> None:
        pass

    @property
    def last_segment(self) -> str:
        return f"{self.tokens[-1]} "

    @property
    def text(self) -> str:
        return "".join(f"{token} " for token in self.tokens)


class Tokenizer:
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def detokenizer(self) -> Words:
        return Words()


class Pair:
    """A tiny model and itself with fewer experts, one of them live."""

    def __init__(self, r: Rig) -> None:
        self.r, self.live = r, "pruned"
        # Half of each group of four: grouped routers stay even, and some token misses one of them.
        self.way = r.prune(dict.fromkeys(r.anatomy.indices, (1, 2, 5, 6)))

    def go(self, side: str) -> None:
        if side != self.live:
            self.way, self.live = self.r.resident.swap(self.way), side

    def ask(self, decoder: Decoder, side: str, heard: list[Any]) -> Steps:
        def hear(index: int, token: int, text: str, experts: Any, weights: Any) -> None:
            routed = [None if a is None else a.tolist() for a in (experts, weights)]
            heard.append((index, token, text, *routed))

        return decoder.steps(PROMPT, DRAWN, lambda: (side, ""), hear)


@pytest.mark.parametrize("name", tiny_models.RUNNABLE)
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
