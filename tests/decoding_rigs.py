"""A tiny model with two states to decode under, and a tokenizer whose tokens are words."""

from __future__ import annotations

from typing import Any

from rigs import Rig

from mlxfun.generation.decoder import Decoder, Steps
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
