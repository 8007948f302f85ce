"""Fixtures of the engine's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
from rigs import Rig, make_rig


@pytest.fixture
def rig() -> Callable[..., Rig]:
    """Build a tapped tiny model: rig("qwen3_moe"), rig("gpt_oss", mode="mxfp4")."""

    def build(name: str, *, mode: str | None = None, **overrides: Any) -> Rig:
        model, config = tiny_models.build(name, wide=mode is not None, **overrides)
        if mode is not None:
            config = tiny_models.quantise(model, copy.deepcopy(config), mode)
        return make_rig(model, config)

    return build
