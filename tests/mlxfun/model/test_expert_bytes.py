"""What an expert is said to take is what saving without it saves, however experts are stored."""

from __future__ import annotations

import pytest
from rigs import keep_fewer

from mlxfun.model.export import ExportView


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "dbrx", "longcat_flash", "deepseek_v3", "ernie4_5_moe"]
)
def test_the_bytes_of_an_expert_are_what_a_prune_saves(rig, name) -> None:
    r = rig(name)

    def view() -> ExportView:
        return ExportView(r.model, r.resident, r.anatomy, {})

    before, each = view().total_bytes(), view().expert_bytes()
    r.prune(keep_fewer(r.anatomy))
    assert before - view().total_bytes() == sum(2 * size for size in each)
    assert view().expert_bytes() == each
