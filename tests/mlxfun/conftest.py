"""Fixtures of the engine's tests."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
from rigs import Rig, make_rig

from mlxfun import Session
from mlxfun.steering.options import SteerOptions


@pytest.fixture(autouse=True, scope="module")
def what_a_module_leaves_is_frozen_too() -> Iterator[None]:
    """What was imported on the way, mostly. Every session that closes collects garbage, and went over
    all of that.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def rig() -> Callable[..., Rig]:
    """Build a tapped tiny model: rig("qwen3_moe"), rig("gpt_oss", mode="mxfp4")."""

    def build(name: str, *, mode: str | None = None, **overrides: Any) -> Rig:
        model, config = tiny_models.build(name, wide=mode is not None, **overrides)
        if mode is not None:
            config = tiny_models.quantise(model, copy.deepcopy(config), mode)
        return make_rig(model, config)

    return build


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    """The demo model, opened once for a module. A module that wants statistics in it has its own."""
    session = Session.open("demo")
    yield session
    session.close()


@pytest.fixture
def session(shared: Session) -> Session:
    """The shared model at its root: nothing staged, no steering, nothing said, nothing counted."""
    if shared.editor.staged is not None:
        shared.discard()
    shared.steer(SteerOptions(clear=True))
    shared.goto(0)
    shared.set_counting(False)
    shared.reset_chat()
    shared.command = ""
    return shared
