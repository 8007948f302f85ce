"""Which families a test runs on by default, where it runs on all of them with `pytest -m wide`.

For promises that hold for every family by one code path. What differs between families (where the
experts are, how routers are read, how layers are called) is tested on all of them by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

USUAL = {
    "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v32", "llama4", "gemma4_text", "hunyuan", "dbrx",
    "qwen3_next", "nemotron_h", "longcat_flash", "phimoe",
    "llama", "gemma3_text", "gpt2", "mamba2", "qwen3_5_dense", "olmo2",
}  # fmt: skip
"""One family of every structure: sliding, sparse, recurrent and latent attention, two mixers, shared
state, shared experts, a list of experts, grouped, sigmoid and sparse-mixer routers."""


def spread(names: Iterable[Any]) -> list[Any]:
    """Parameters: those of the usual families as they are, the others marked `wide`.

    Each is a name, or a tuple whose first is one.
    """
    found = []
    for one in names:
        values = one if isinstance(one, tuple) else (one,)
        found.append(pytest.param(*values, marks=() if values[0] in USUAL else pytest.mark.wide))
    return found
