"""Signals raise between imports and never inside one, which would leave its lock taken for ever."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupts.Terminated)],
)
def test_a_signal_in_an_import_is_raised_once_it_is_over(
    number: signal.Signals, kind: type[KeyboardInterrupt], tmp_path: Path, monkeypatch: Any
) -> None:
    name = f"interrupted_by_{number.name.lower()}"
    text = f"import signal\nsignal.raise_signal({int(number)})\nsum(range(9))\nWHOLE = True\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    interrupts.listen()
    raised = None
    try:
        importlib.import_module(name)
        time.sleep(5)
    except kind as problem:
        raised = problem
    assert type(raised) is kind
    assert sys.modules.pop(name).WHOLE


def test_a_program_that_is_run_by_an_import_can_be_interrupted(
    tmp_path: Path, monkeypatch: Any
) -> None:
    text = "import signal\nfrom commands import interrupts\ndef main():\n    interrupts.listen()\n"
    text += "    signal.raise_signal(signal.SIGINT)\nmain()\n"
    (tmp_path / "runs_at_import.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("runs_at_import")


def test_elsewhere_it_is_raised_at_once() -> None:
    interrupts.listen()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(interrupts.Terminated):
        signal.raise_signal(signal.SIGTERM)


def test_what_is_switched_off_stays_so_and_asyncio_finds_what_it_replaces() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.listen()
    interrupts.as_python_does()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.listen()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    interrupts.as_python_does()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
