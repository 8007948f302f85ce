"""How much to hold in memory: the options of load and of the program, and what a recording keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from commands import cli
from commands.registry import parse
from commands.workbench.residency import Residency
from mlxfun.checkpoint.options import LoadOptions, PackedCache
from mlxfun.errors import UsageError
from tests.commands.conftest import Bench


def options_of(line: str) -> LoadOptions:
    return Residency.taken(parse(line).params).added_to(LoadOptions())


def test_sizes_and_words() -> None:
    assert options_of("load x") == LoadOptions()
    assert options_of("load x --resident auto").resident == "auto"
    assert options_of("load x --resident 2GiB").resident == 2 << 30
    assert options_of("load x --resident 0").resident == 0  # too little, and not all of it
    assert options_of("load x --capacity 7 --miss skip --read-ahead 3") == LoadOptions(
        capacity=7, miss="skip", read_ahead=3
    )
    kv = options_of("load x --kv-bits 4 --kv-group-size 32 --kv-start 7").kv
    assert kv == PackedCache(4, 32, 7)
    assert options_of("load x --kv-bits 8").kv == PackedCache(8, 64, 0)
    path = Path("experts.json")
    assert options_of(f"load x --resident auto --profile {path}").profile == path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("load x --resident some", "is none of auto, all, none, and no size like 20GiB"),
        ("load x --capacity 0", "capacity"),
        ("load x --capacity 3 --resident auto", "both say how much"),
        ("load x --profile experts.json", "--profile is about experts that are not in memory"),
        ("load x --miss skip", "--miss is about"),
        ("load x --kv-start 5", "--kv-start 5 is about packed caches"),
        ("load x --kv-group-size 32", "--kv-group-size 32 is about packed caches"),
        ("load x --resident all --read-ahead 2", "--read-ahead is about"),
    ],
)
def test_what_does_not_go_together_is_named(line: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options_of(line)


def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """What the program would run."""
    found: list[Any] = []
    monkeypatch.setattr(cli, "run", lambda start: found.append(start) or 0)
    result = CliRunner().invoke(cli.shell, ["--headless", *words], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value


def test_the_program_takes_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    start = started(monkeypatch, "demo", "--capacity", "4", "--miss", "skip", "-c", "info")
    assert start.lines == ("load demo --capacity 4 --miss skip", "info")
    assert started(monkeypatch, "demo", "--resident", "2GiB").lines == (
        f"load demo --resident {2 << 30}",
    )
    with pytest.raises(Exception, match="--capacity goes with a model"):
        started(monkeypatch, "--capacity", "4", "-c", "help")


def test_a_recording_loads_the_model_as_it_was_loaded(tmp_path: Path) -> None:
    file = tmp_path / "session.mlxfun"
    recorded, replayed = Bench(), Bench()
    recorded.do(f"record {file}", "load demo --capacity 4", "info", "record --stop")
    assert "#: residency --capacity 4\n" in file.read_text()
    replayed.do(f"replay {file}")
    loaded = replayed.engine._bench.loaded
    assert loaded is not None
    assert loaded.residency == "--capacity 4"
    for bench in (recorded, replayed):
        bench.engine.close()
