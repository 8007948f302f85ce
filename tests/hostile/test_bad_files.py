"""Damaged files of every kind: accepted, or refused with one sentence, and nothing is touched."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands.config import read_config
from mlxfun.data import demo
from mlxfun.errors import UsageError
from tests.e2e.conftest import COLLECT, Shell
from tests.hostile.bad_files import damaged

EACH = 90
"""Seeds per kind of file."""
SAMPLE = 4
"""Seeds per kind that run by default."""
MEBIBYTES = 500
FAULT = re.compile(r"unexpected [A-Z]")  # how an exception that nobody foresaw is reported

KINDS = {
    "session.mlxfun": "replay {}",
    "recipe.recipe": "recipe {}",
    "data.jsonl": "collect --dataset {} --max-samples 2 --max-tokens 8",
    "text.txt": "collect --dataset {} --max-samples 2 --max-tokens 8",
    "list.json": "prune --expert-list {}",
    "list.csv": "prune --expert-list {}",
    "stats.npz": "stats load {}",
    "other.npz": "stats diff stats.npz {}",
    "domain_report.json": "steer --domain-map {}",
    "prune_report.json": "prune --n-prune 2 --domain-map {}",
    "steer.json": "steer --config {}",
    "replaced.json": "plan save {}",
}
"""A kind of file, and a command that reads it."""
MODEL = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model-00001-of-00001.safetensors",
)
SPECIAL = ("missing", "pipe", "directory", "dangling", "endless", "unreadable name")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Path]]:
    """A shell on the demo model in a directory with a valid file of each kind."""
    here = tmp_path_factory.mktemp("hostile")
    before = Path.cwd()
    os.chdir(here)
    shell = Shell()
    shell.do("load demo", COLLECT, "prune --n-prune 2", "plan save list.json", "plan save list.csv")
    shell.do("plan save replaced.json", "discard", "stats save stats.npz", "stats save other.npz")
    shell.do(
        "domain-scan --domain demo:python --general demo:mixed --domain-name p --max-samples 4 "
        "--max-tokens 32 --output domain_report.json"
    )
    shutil.copy("domain_report.json", "prune_report.json")
    Path("session.mlxfun").write_text("set metric freq\nprune --n-prune 2\ndiscard\n")
    Path("recipe.recipe").write_text("at most 1 KB\njudge --samples 1\ntry prune --n-prune 1\n")
    Path("data.jsonl").write_text('{"text": "a few words of text"}\n' * 3)
    Path("text.txt").write_text("a few words\n\nof text\n")
    Path("steer.json").write_text('{"activate": {"1": [3]}, "rule": "forced"}')
    yield shell, here
    shell.engine.close()
    os.chdir(before)


def standing(shell: Shell) -> tuple[object, ...]:
    return shell.standing(), shell.engine._bench.settings, shell.engine._bench.files


def check(shell: Shell, line: str, what: str) -> bool:
    """Run `line`; whether it was refused. The rule holds either way."""
    before, files = standing(shell), sorted(map(str, Path().rglob("*")))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = shell.run(line)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < MEBIBYTES * 1024, f"{what}: {grown} KiB"
    if ended.error is None:
        shell.do("steer --clear", "set metric reap_sum")
        if shell.engine.view().plan is not None:
            shell.do("discard")
        shell.do("stats load stats.npz", "goto 0")
        for made in set(map(str, Path().rglob("*"))) - set(files):
            Path(made).unlink()
        return False
    assert not FAULT.search(ended.error), f"{what}: {ended.error[:300]}"
    assert ended.error.strip(), what
    assert len(ended.error) < 4200, what
    if not line.startswith(("replay", "recipe")):  # what ran before the bad line has run
        assert standing(shell) == before, what
        assert sorted(map(str, Path().rglob("*"))) == files, what
    return True


def run_kind(shell: Shell, name: str, seeds: range) -> int:
    refused = 0
    good = Path(name).read_bytes()
    try:
        for seed in seeds:
            Path(name).write_bytes(damaged(good, seed))
            refused += check(shell, KINDS[name].format(name), f"{name}, seed {seed}")
    finally:
        Path(name).write_bytes(good)
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_damaged_files(place: tuple[Shell, Path], name: str) -> None:
    run_kind(place[0], name, range(SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(place: tuple[Shell, Path], name: str) -> None:
    assert run_kind(place[0], name, range(SAMPLE, EACH)) > EACH // 8


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", [n for n in KINDS if n != "replaced.json"])
def test_what_is_no_ordinary_file_is_refused(
    place: tuple[Shell, Path], name: str, special: str
) -> None:
    path = Path(f"special-{name}")
    if special == "pipe":
        os.mkfifo(path)
    elif special == "directory":
        path.mkdir()
    elif special == "dangling":
        path.symlink_to("nowhere")
    elif special == "endless":
        path.symlink_to("/dev/zero")
    elif special == "unreadable name":
        path = Path(f"{'n' * 300}-{name}")
    try:
        assert check(place[0], KINDS[name].format(path), f"{name}, {special}")
    finally:
        if os.path.isdir(path):  # not path.is_dir(), which raises for such a name
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()


def configurations(seeds: range) -> None:
    good = (
        b'theme = "mlxfun-light"\nrefresh_rate = 10\n[defaults]\nmetric = "freq"\n[keys]\na = "b"\n'
    )
    path = Path("config.toml")
    for seed in seeds:
        path.write_bytes(damaged(good, seed))
        try:
            read_config(path)
        except UsageError as problem:
            sentence = str(problem)
            assert len(sentence) < 4200, seed
    path.unlink()


def test_a_sample_of_damaged_configurations(place: tuple[Shell, Path]) -> None:
    configurations(range(40))


@pytest.mark.slow
def test_damaged_configurations(place: tuple[Shell, Path]) -> None:
    configurations(range(40, 240))


def models(directory: Path, name: str, seeds: range) -> None:
    shell = Shell()
    shutil.copytree(demo.model_path(), directory)
    good = (directory / name).read_bytes()
    try:
        for seed in seeds:
            (directory / name).write_bytes(damaged(good, seed))
            ended = shell.run(f"load {directory}")
            assert not FAULT.search(ended.error or ""), (seed, ended.error)
    finally:
        shell.engine.close()


@pytest.mark.parametrize("name", MODEL)
def test_a_sample_of_damaged_models(tmp_path: Path, name: str) -> None:
    models(tmp_path / "model", name, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL)
def test_damaged_models(tmp_path: Path, name: str) -> None:
    models(tmp_path / "model", name, range(2, 32))
