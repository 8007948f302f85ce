"""The longest text that a model was made for, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxfun.model.anatomy import facts


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model's positions reach, None where config.json does not say.

    With scaled rotary embeddings (YaRN and its like) `factor` times the original length, if that
    is more than the plain figure: config files differ in which of the two they give.
    """
    for part in (*(config.get(key) for key in facts.NESTED_CONFIGS), config):
        if not isinstance(part, Mapping):
            continue
        given = [_count(part.get(key)) for key in facts.CONTEXT_KEYS]
        if any(given):
            return max(next(filter(None, given)), _scaled(part))
    return None


def beyond_context(config: Mapping[str, Any], longest: int) -> str:
    """What to warn of ahead of a text of `longest` tokens; "" where the model reaches so far."""
    most = context_length(config)
    if most is None or longest <= most:
        return ""
    return (
        f"the longest sample has {longest:,} tokens, and the model's context is {most:,}: what it does "
        f"beyond that says little; --max-tokens {most} cuts there"
    )


def _scaled(config: Mapping[str, Any]) -> int:
    for key in facts.ROPE_CONFIGS:
        rope = config.get(key)
        if isinstance(rope, Mapping):
            factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
            if isinstance(factor, int | float):
                return int(factor * _count(original))
    return 0


def _count(value: object) -> int:
    """A number of tokens, 0 for what is none."""
    return value if isinstance(value, int) and value > 0 else 0
