"""The real engine on the bundled model, in this process: one load for a module's tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from commands.engine import Engine
from mlxfun.data import demo
from mlxfun.events import Event, JobEnded, Notice
from tests.warm.programs import SHELL, command, share_kernels

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model-00001-of-00001.safetensors"
COLLECT = "collect --dataset demo:mixed --max-samples 6 --max-tokens 48 --seed 0"


class Shell:
    """Types lines and reads what comes of them."""

    def __init__(self) -> None:
        self.engine = Engine(seed=0)
        self._arrived: SimpleQueue[Event] = SimpleQueue()
        self.notices: list[str] = []
        self.engine.subscribe(self._arrived.put)

    def run(self, line: str) -> JobEnded:
        """What came of `line`."""
        job = self.engine.run(line)
        while True:
            event = self._arrived.get(timeout=120)
            if isinstance(event, Notice):
                self.notices.append(event.text)
            if isinstance(event, JobEnded) and event.job == job:
                return event

    def do(self, *lines: str) -> JobEnded:
        """Run lines that must succeed; the last one's end."""
        assert lines
        for line in lines:
            ended = self.run(line)
            assert ended.error is None, ended.error
        return ended

    def refused(self, line: str, usage: bool = False) -> str:
        """The sentence with which `line` is refused, the model being untouched by it."""
        before = self.standing()
        ended = self.run(line)
        assert ended.error is not None, f"{line} was accepted"
        assert ended.usage is usage, ended.error
        assert self.standing() == before
        return ended.error

    def standing(self) -> tuple[object, ...]:
        """All of the session that a refused command must leave as it was."""
        view = self.engine.view()
        samples = view.heat.samples if view.heat else None
        return view.state, view.live, view.plan, view.history, view.steering, samples

    @property
    def checkpoint(self) -> str:
        """Identity of the checkpoint that is resident."""
        loaded = self.engine._bench.loaded
        assert loaded is not None
        return loaded.checkpoint

    def reset(self) -> None:
        """The model as loaded, nothing staged, no steering, statistics as after COLLECT."""
        if self.engine.view().plan is not None:
            self.do("discard")
        self.do("steer --clear", "goto 0")


@pytest.fixture(scope="session")
def resident() -> Iterator[Shell]:
    shell = Shell()
    shell.do("load demo", COLLECT)
    yield shell
    shell.engine.close()
    assert not shell.engine.alive


@pytest.fixture
def shell(resident: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The demo model as loaded, with statistics, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    resident.reset()
    resident.notices.clear()
    return resident


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """The demo model just loaded, without statistics or history."""
    monkeypatch.chdir(tmp_path)
    shell = Shell()
    shell.do("load demo")
    yield shell
    shell.engine.close()


def checkpoint(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """A checkpoint with the bundled tokenizer."""
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(demo.model_path() / file, path / file)


def demo_copy(path: Path) -> Path:
    """A copy of the bundled model to damage; rechanges its modes weights."""
    shutil.copytree(demo.model_path(), path)
    return path / WEIGHTS


class Program:
    """mlxfun-shell in processes of its own, in a directory of its own.

    cold: each in a new interpreter, for what happens while it imports.
    """

    def __init__(self, directory: Path, *, cold: bool = False) -> None:
        self.directory = directory
        self._command = [sys.executable, "-m", "commands"] if cold else command(SHELL)
        elsewhere = directory.with_name(directory.name + "-elsewhere")
        elsewhere.mkdir(exist_ok=True)
        share_kernels(elsewhere)
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(elsewhere),
            "XDG_STATE_HOME": str(elsewhere), "XDG_CACHE_HOME": str(elsewhere), "OMP_NUM_THREADS": "2",
        }  # fmt: skip

    def run(self, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *arguments], cwd=self.directory, env=self.environment,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, *arguments], cwd=self.directory, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def typed(lines: Sequence[str]) -> list[str]:
    """`-c` options for lines."""
    return [word for line in lines for word in ("-c", line)]
