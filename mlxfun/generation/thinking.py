"""The tags with which models mark thinking ahead of an answer."""

from __future__ import annotations

from mlxfun.data.datasets import Tokenizer

THINKING = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel|>analysis", "<|channel|>final"),
    ("<|channel>thought", "<channel|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""(start, end) of thinking blocks. A tokenizer's own pair is judged as well."""


def thinking_tags(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    """The thinking blocks to look for in this tokenizer's answers."""
    start, end = (getattr(tokenizer, name, None) for name in ("think_start", "think_end"))
    own = ((start, end),) if start is not None and end is not None else ()
    return tuple(dict.fromkeys((*own, *THINKING)))
