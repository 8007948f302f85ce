"""Hooks on any module: they nest, they intervene, they vanish, and a wrong name is an error."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from mlx.utils import tree_flatten

from mlxfun.errors import HookError
from mlxfun.hooks.intercept import Hooks

TOKENS = mx.array([[3, 14, 15, 9, 26, 5]])


def bits(array: mx.array) -> bytes:
    return bytes(memoryview(array.astype(mx.float32)))


@pytest.fixture(params=["llama", "qwen3_moe", "mamba2"])
def model(request):
    built, _ = tiny_models.build(request.param)
    return built


def linears(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return [p for p, m in modules if isinstance(m, nn.Linear) and "layers.1" in p]


def test_observing_every_linear_changes_no_bit_and_leaves_every_class_as_it_was(model):
    before = bits(model(TOKENS))
    classes = {path: type(module) for path, module in model.named_modules()}
    names = [name for name, _ in tree_flatten(model.parameters())]
    hooks, seen = Hooks(dict(model.named_modules())), []
    for path in linears(model):
        hooks.on_call(path, lambda own, x, path=path: (seen.append(path), own(x))[1])
    with hooks:
        assert bits(model(TOKENS)) == before
        assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert sorted(set(seen)) == sorted(linears(model))
    assert {path: type(module) for path, module in model.named_modules()} == classes


def test_an_intervention_equals_the_edit_of_the_weight_that_it_stands_for(model):
    path = linears(model)[0]
    edited = copy.deepcopy(model)
    module = dict(edited.named_modules())[path]
    module.weight = module.weight * 2
    hooks = Hooks(dict(model.named_modules()))
    hooks.on_call(path, lambda own, x: own(x) * 2)
    plain = model(TOKENS)
    with hooks:
        doubled = model(TOKENS)
    assert not mx.allclose(doubled, plain, rtol=1e-3, atol=1e-4)
    assert mx.allclose(doubled, edited(TOKENS), rtol=1e-4, atol=1e-5)


def test_the_hook_attached_last_runs_outermost_whichever_is_detached_first():
    class Plus(nn.Module):
        def __call__(self, x):
            return x + 1

    module = Plus()
    inner, outer = Hooks({"m": module}), Hooks({"m": module})
    inner.on_call("m", lambda own, x: own(x) * 10)
    outer.on_call("m", lambda own, x: own(x) + 5)
    with inner, outer:
        assert module(1) == 25
    assert type(module) is Plus
    inner.attach()
    outer.attach()
    inner.detach()
    assert module(1) == 7
    outer.detach()
    assert type(module) is Plus
    assert module(1) == 2


def test_an_unknown_name_is_refused_and_the_near_ones_are_listed(model):
    hooks = Hooks(dict(model.named_modules()))
    wrong = linears(model)[0].replace("layers.1", "layer.1")
    with pytest.raises(HookError, match=r"no module .*near names are .*layers\.1"):
        hooks.on_call(wrong, lambda own, x: own(x))
    with pytest.raises(HookError, match="has no as_linear"):
        hooks.on_call(linears(model)[0], lambda own, x: own(x), method="as_linear")
    with pytest.raises(HookError, match="has no bogus; it has"):
        hooks.on_attribute(linears(model)[0], "bogus", lambda value: value)


def test_a_target_that_the_forward_does_not_reach_is_an_error():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def __call__(self, x):
            return self.used(x)

    module = Two()
    hooks = Hooks(dict(module.named_modules()))
    hooks.on_call("used", lambda own, x: own(x))
    hooks.on_call("idle", lambda own, x: own(x))
    with pytest.raises(HookError, match="did not reach idle: the hook has no effect"), hooks:
        module(mx.ones((1, 4)))
    assert type(module.used) is nn.Linear, "the error leaves nothing behind"


def test_a_failing_forward_leaves_every_class_as_it_was(model):
    classes = [type(module) for _, module in model.named_modules()]
    hooks = Hooks(dict(model.named_modules()))

    def fail(own, *args):
        raise ValueError("no")

    hooks.on_call(linears(model)[0], fail)
    with pytest.raises(ValueError, match="no"), hooks:
        model(TOKENS)
    assert [type(module) for _, module in model.named_modules()] == classes


def test_reading_an_attribute_can_be_answered():
    class Gate(nn.Module):
        """As the gates of several models do, it reads its weight as an attribute."""

        def __init__(self):
            super().__init__()
            self.weight = mx.ones((4, 4))

        def __call__(self, x):
            return x @ self.weight.T

    module = Gate()
    own = module.weight
    hooks = Hooks({"m": module})
    hooks.on_attribute("m", "weight", lambda value: value * 0)
    with hooks:
        assert not module(mx.ones((1, 4))).any().item()
        assert module["weight"] is own, "the parameter itself is untouched"
    assert module(mx.ones((1, 4))).any().item()
