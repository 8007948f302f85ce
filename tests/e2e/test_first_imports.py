"""Ctrl-C while the program is still being imported: silence and exit code 130, whatever is imported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT

START = """
import os, signal, sys
TARGET, WAY = sys.argv[1:3]

class Interrupt:
    done = False
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == TARGET and not cls.done:
            cls.done = True
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # where Python looks for signals
                pass

sys.meta_path.insert(0, Interrupt)
if WAY == "caught":  # an import that is tried, as many libraries do
    import builtins
    real = builtins.__import__
    def tried(name, *rest):
        try:
            return real(name, *rest)
        except BaseException:
            return real(name, *rest)
    builtins.__import__ = tried
from commands.__main__ import main
sys.argv = ["mlxfun-shell", "--version"]
main()
"""
IMPORTED = ("commands.cli", "click", "commands.interrupts", "commands.streams", "dataclasses")


def run(name: str, way: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START, name, way], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["plain", "caught"])
@pytest.mark.parametrize("name", IMPORTED)
def test_an_interrupt_during_an_import_is_silence_and_130(name: str, way: str) -> None:
    done = run(name, way)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", ""), name


def test_without_one_the_program_runs() -> None:
    done = run("no.such.module", "plain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mlxfun-shell"), done.stdout


def test_an_interrupt_that_the_shell_has_switched_off_stays_so() -> None:
    """As for programs in the background."""
    done = subprocess.run(
        [sys.executable, "-c", START, "click", "plain"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_entry_point_imports_nothing_of_its_own() -> None:
    names = "import __future__, sys; before = set(sys.modules); import commands.__main__; "
    done = subprocess.run(
        [sys.executable, "-c", names + "print(sorted(set(sys.modules) - before))"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = done.stdout.strip()
    assert found == "['commands', 'commands.__main__']", found
