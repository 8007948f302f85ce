"""Reading ahead changes what is read when, and never what is answered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
from slot_rigs import PROMPT, Slotted, continued, on_disk, whole_model

from mlxfun.errors import ModelError
from mlxfun.memory.slots import ahead
from mlxfun.memory.slots.ahead import Followers, ReadAhead


def test_what_followed_is_likely() -> None:
    followers = Followers(4, 6)
    for _ in range(3):
        followers.learn(np.array([0, 1]), np.array([2, 3]))
    followers.learn(np.array([1, 2]), np.array([4, 5]))
    likely = followers.likely(np.array([0]))
    assert likely.tolist() == [0, 0, 1, 1, 0, 0]
    assert followers.likely(np.array([1]))[4] == 0.25
    assert not followers.likely(np.array([3])).any()


def test_answers_are_the_same_and_what_was_read_ahead_is_used(tmp_path: Path) -> None:
    model, config = tiny_models.build("qwen3_moe")
    path = on_disk(tmp_path, model, config)
    whole = whole_model(path)
    some = Slotted.open(path, 3, read_ahead=4)
    for prompt in (PROMPT, PROMPT[::-1], PROMPT[:3]):
        assert continued(some.model, prompt, 40) == continued(whole, prompt, 40)
    report = some.slots.report()
    assert report.ahead > 0
    assert report.misses >= report.ahead
    some.close()


class Bank:
    """A layer whose experts are all on disk."""

    experts = 8

    def __init__(self) -> None:
        self.source = SimpleNamespace(stacks={})

    def absent(self, experts: Any) -> list[int]:
        return sorted(experts)


def told(monkeypatch: pytest.MonkeyPatch, reads: list[Any], fails: bool = False) -> ReadAhead:
    def read(sources: Any, experts: Any, reader: Any) -> dict[int, Any]:
        reads.append(tuple(experts))
        if fails:
            raise ModelError("gone")
        return {e: {"path": e} for e in experts}

    monkeypatch.setattr(ahead, "read", read)
    banks: Any = [Bank(), Bank()]
    return ReadAhead(banks, SimpleNamespace(), 2)  # type: ignore[arg-type]


def step(one: ReadAhead, before: list[int], after: list[int], missing: list[int]) -> dict[int, Any]:
    one.chosen(0, np.array(before), 1)
    one.chosen(1, np.array(after), 1)
    one._pool.submit(int).result()  # all that was asked for before is read
    return dict(one.ready(1, missing))


def test_only_what_is_missing_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    one = told(monkeypatch, reads)
    assert step(one, [0, 1], [4, 5], [4, 5]) == {}  # nothing is known yet
    assert set(step(one, [0, 1], [4, 6], [4, 6])) == {4}
    assert one.unused == 1
    one.close()


def test_a_prompt_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    one = told(monkeypatch, reads)
    for _ in range(3):
        one.chosen(0, np.arange(8), 100)
        one.chosen(1, np.arange(8), 100)
    assert reads == []
    one.close()


def test_it_rests_where_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    one = told(monkeypatch, reads)
    monkeypatch.setattr(ahead, "TRIED", 8)
    for _ in range(50):
        step(one, [0, 1], [4, 5], [])  # always in memory already
    one.close()
    assert 3 <= len(reads) <= 8


def test_a_read_that_fails_is_left_to_the_one_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[Any] = []
    one = told(monkeypatch, reads, fails=True)
    step(one, [0, 1], [4, 5], [4, 5])
    assert step(one, [0, 1], [4, 5], [4, 5]) == {}
    assert reads
    one.close()
