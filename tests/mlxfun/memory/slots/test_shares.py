"""Layers whose choices are spread wider get more of the slots, where recorded use says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.generation.options import GenerateOptions
from mlxfun.memory.plan.fit import Machine, fit
from mlxfun.memory.plan.headers import outline
from mlxfun.memory.plan.parts import parts_of
from mlxfun.memory.slots.shares import divided, served

NARROW, WIDE = np.array([90.0, 10, 0, 0, 0, 0, 0, 0]), np.arange(8.0, 0, -1)


def best(used: list[np.ndarray], sizes: list[int], budget: int, least: int) -> float:
    """The largest share that any division serves, by trying all."""
    shape = [len(row) for row in used]
    found = 0.0
    for counts in np.ndindex(*(n + 1 for n in shape)):
        cost = sum(n * size for n, size in zip(counts, sizes, strict=True))
        if cost <= budget and min(counts) >= least:
            found = max(found, served(used, counts))
    return found


def test_what_is_served_is_the_most_that_the_bytes_allow() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        used = [random.random(5) ** random.integers(1, 9) for _ in range(3)]
        counts = divided(used, [1, 1, 1], [2, 2, 2], 1)
        most = best(used, [1, 1, 1], 6, 1)
        assert served(used, counts) == pytest.approx(most, abs=0.02)
        if counts != (2, 2, 2):
            assert served(used, counts) == pytest.approx(most)


def test_layers_that_need_fewer_slots_leave_them_to_others() -> None:
    assert divided([NARROW, WIDE], [1, 1], [4, 4], 2) == (2, 6)
    assert divided([NARROW, WIDE], [1, 2], [4, 4], 2) == (2, 5)
    assert divided([WIDE, WIDE], [1, 1], [4, 4], 2) == (4, 4)
    assert divided([NARROW, 0 * WIDE], [1, 1], [4, 4], 2) == (2, 6)  # nothing known: as if alike


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Half of the demo's layers use two experts only."""
    tables = {
        str(layer): {str(e): 1.0 for e in range(16 if layer % 2 else 2)} for layer in range(6)
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"layers": tables}))
    return path


def test_a_size_is_divided_by_a_profile_and_answers_stay_the_same(profile: Path) -> None:
    parts = parts_of(outline("demo"), widened=True)
    size = parts.kept + 6 * parts.one_each
    whole = Session.open("demo")
    said = whole.chat("What is a mortgage?", GenerateOptions(max_tokens=12)).text
    uneven = Session.open("demo", LoadOptions(resident=size, profile=profile))
    report = uneven.residency()
    assert report.slots == (2, 10, 2, 10, 2, 10)
    assert report.slot_bytes + report.kept_bytes <= size
    assert (report.bytes_read, report.tokens) == (0, 0)  # what loading read is no token's
    assert "2 to 10 of 16 experts a layer in slots" in report.summary()
    assert uneven.chat("What is a mortgage?", GenerateOptions(max_tokens=12)).text == said
    uneven.sweep_residency((3, 4), 4)
    assert uneven.residency().slots == report.slots
    even = Session.open("demo", LoadOptions(capacity=6, profile=profile))
    assert set(even.residency().slots) == {6}
    for session in (whole, uneven, even):
        session.close()


def test_the_plan_foretells_what_loading_then_divides(profile: Path) -> None:
    parts = parts_of(outline("demo"))
    used = np.array([[1.0] * (16 if layer % 2 else 2) + [0.0] * (0 if layer % 2 else 14)
                     for layer in range(6)])  # fmt: skip
    machine = Machine(int((parts.kept + 6 * parts.one_each) / 0.8) + 1)
    report = fit("demo", parts, machine, used)
    assert report.slots == (2, 10, 2, 10, 2, 10)
    assert report.hit_rate == pytest.approx((1 + 10 / 16) / 2)
    assert report.summary().endswith("load demo --resident auto --profile FILE")
