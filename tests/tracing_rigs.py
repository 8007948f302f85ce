"""Shared by the tests of tracing: models of any family, wrapped to be traced."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import tiny_models

from mlxfun.tracing.model import Model

TOKENS = [[3, 14, 15, 9, 26, 5], [5, 6, 7, 8, 9, 10]]


class Letters:
    """A tokenizer whose tokens are letters: a is 1, b is 2, ..."""

    has_chat_template = False
    eos_token_ids = ()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(token + 96) for token in tokens)


def tiny(name: str, mode: str | None = None, **overrides: Any) -> Model:
    model, config = tiny_models.build(name, wide=mode is not None, **overrides)
    if mode is not None:
        config = tiny_models.quantise(model, copy.deepcopy(config), mode)
    return Model.of(model, config, Letters())


def bits(array: mx.array) -> bytes:
    mx.eval(array)
    return bytes(memoryview(array.astype(mx.float32)))


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}
