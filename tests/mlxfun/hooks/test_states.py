"""Hidden states come back bit for bit, from memory and from files, and the files go with them."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.hooks.states import States


def arrays(dtype: mx.Dtype) -> list[mx.array]:
    mx.random.seed(3)
    made = [mx.random.normal((2, 5, 8)).astype(dtype) for _ in range(4)]
    made[1] = mx.full((2, 5, 8), float("nan")).astype(dtype)
    mx.eval(made)
    return made


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("held", [0, 2, 4])
def test_what_is_put_comes_back_bit_for_bit(dtype, held, tmp_path) -> None:
    made = arrays(dtype)
    states = States(tmp_path, bound=held * made[0].nbytes)
    for turn in range(3):  # replaced again and again
        for number, array in enumerate(made):
            states.put(number, mx.roll(array, turn, axis=-1))
        for number, array in enumerate(made):
            found, wanted = states.get(number), mx.roll(array, turn, axis=-1)
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(np.array(found.view(mx.uint8)),
                                          np.array(wanted.view(mx.uint8)))  # fmt: skip
    assert states.spilled == (4 - held) * made[0].nbytes
    del states
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_all_is_held(tmp_path) -> None:
    states = States(None, bound=0)
    states.put(0, mx.ones((2, 2)))
    assert states.spilled == 0
