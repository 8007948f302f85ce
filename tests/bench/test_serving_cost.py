"""What serving costs against the batch generator alone: `pytest -n 0 -m bench -s tests/bench`.

The budget of 0.85 is judged on a quiet machine, by serving_cost.py itself; here nothing may have
become slower by multiples.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytestmark = pytest.mark.bench


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import sys

    made = sys.modules["random_model"] = module("random_model")  # its dataclass looks itself up
    path = made.make(made.PRESETS["small"], tmp_path_factory.mktemp("bench") / "model")
    found: dict[str, Any] = module("serving_cost").measure(path, 3, 16, 48, 32)
    print(json.dumps(found, indent=1))
    return found


def test_clients_get_most_of_what_the_generator_gives(measured: dict[str, Any]) -> None:
    ratios = measured["tokens a second against the batch generator alone"]
    assert ratios["counting off, whole"] > 0.6
    assert ratios["counting off, streamed"] > 0.6
    assert ratios["counting full, streamed"] > 0.4


def test_counting_costs_little(measured: dict[str, Any]) -> None:
    for name, ratio in measured["tokens a second against counting off"].items():
        assert ratio > 0.8, name  # 0.9 on a quiet machine


def test_a_slot_is_freed_at_once(measured: dict[str, Any]) -> None:
    assert measured["slot freed after, seconds"] < 0.05 * 5


def test_the_first_token_of_four_streams_comes_soon(measured: dict[str, Any]) -> None:
    assert measured["last first token of 4 streams against that of 1"] < 6


def test_memory_is_flat_over_many_requests() -> None:
    from serving_rigs import serving

    with serving("load demo", cache_bytes=8 << 20, count="full") as served:
        found = module("serving_cost").hour(served, 1600)
    print(json.dumps(found, indent=1))
    assert found["active MiB more at the end"] < 4
    assert found["process MiB more at the end"] < 60


def test_an_agent_reads_little_anew(measured: dict[str, Any]) -> None:
    assert measured["agent session from cache, share"] > 0.9
