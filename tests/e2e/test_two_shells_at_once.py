"""Two shells write to one place at once: one stops in the middle, the other comes, the first goes on.

The first is stopped at calls spread over all that it does to files. Nothing of either is lost or
mixed: a file is that of one of the two, and who could not write is told so in a sentence.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.test_kills import points
from tests.hostile.warm import Ended, Warm

if sys.platform != "linux":
    pytest.skip("forks a process that has imported MLX", allow_module_level=True)

STOPS = 4
ON_MODEL = ("load demo", "stats load {}.npz")


@dataclass(frozen=True)
class Pair:
    """lines: of each shell; {} is a for the first and b for the second. wins: whether both succeed,
    and the last one's file stays; otherwise one is refused, whoever comes second."""

    lines: tuple[str, ...]
    out: str
    wins: bool = True


PAIRS = {
    "stats merge": Pair(("stats merge {0}.npz {0}.npz --output out.npz",), "out.npz"),
    "stats diff": Pair(("stats diff {0}.npz c.npz --output out.json",), "out.json"),
    "stats save": Pair((*ON_MODEL, "stats save out.npz"), "out.npz"),
    "plan save": Pair((*ON_MODEL, "prune --n-prune 2", "plan save out.json"), "out.json"),
    "scan report": Pair(("load demo", "domain-scan --domain demo:python --general demo:mixed "
                         "--domain-name {} --max-samples 4 --max-tokens 8 --output out.json"), "out.json"),
    "export": Pair(("set metric freq", "# {}", "export report out.md"), "out.md", wins=False),
    "export --force": Pair(("# {}", "export report out.md --force"), "out.md"),
    "save": Pair((*ON_MODEL, "prune --n-prune 2", "apply", "save out"), "out", wins=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Warm, Warm]:
    """Two shells. The directory of the first has three files of statistics, a, b and c."""
    made = tmp_path_factory.mktemp("both")
    (made / "sources").mkdir()
    first, second = Warm(made / "sources", made / "first"), Warm(made / "sources", made / "second")
    for seed, name in enumerate("abc"):
        first.lines(
            "load demo",
            f"collect --dataset demo:mixed --max-samples 2 --max-tokens 16 --seed {seed}",
            f"stats save {name}.npz",
        )
    return first, second


def words(lines: tuple[str, ...], who: str) -> list[str]:
    found = []
    for line in lines:
        line = f"set seed {ord(who)}" if line.startswith("#") else line.format(who)
        found += ["-c", line]
    return ["--headless", *found]


def at_once(
    both: tuple[Warm, Warm], here: Path, stop_at: int, one: list[str], other: list[str], **more: str
) -> tuple[Ended, Ended, int]:
    """Run one until its call number `stop_at`, then the other, then the rest of the one; and how
    many calls the one had."""
    first, second = both
    count = first.home / "count"
    count.write_text("")
    ended: list[Ended] = []
    environment = {name: str(here) for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "HOME")}

    def run() -> None:
        before = ("tests.hostile.kill_points:arm_to_stop", stop_at, str(here), str(count))
        ended.append(
            first.run(*one, directory=here, before=before, environment=environment, **more)
        )

    thread = threading.Thread(target=run)
    thread.start()
    pid = stopped(count, thread) if stop_at else None
    late = None
    if pid is not None:
        late = second.run(*other, directory=here, environment=environment, **more)
        os.kill(pid, signal.SIGCONT)
    thread.join(timeout=60)
    if late is None:
        late = second.run(*other, directory=here, environment=environment, **more)
    return ended[0], late, int(count.read_text().split()[1])


def stopped(count: Path, thread: threading.Thread) -> int | None:
    """The process that wrote `count`, once it stands still; None if it ended instead."""
    while thread.is_alive():
        found = count.read_text().split()
        if found:
            try:
                state = Path(f"/proc/{found[0]}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return None
            if state == "T":
                return int(found[0])
        time.sleep(0.002)
    return None


def new_place(tmp_path: Path, sources: Path, name: str) -> Path:
    here = tmp_path / name
    here.mkdir()
    for file in sources.glob("*.npz"):
        (here / file.name).hardlink_to(file)
    return here


def content(path: Path) -> object:
    if path.is_dir():
        return {p.name: p.read_bytes() for p in path.iterdir()}
    return path.read_bytes()


def visible(here: Path) -> set[str]:
    return {p.name for p in here.iterdir() if p.name not in ("a.npz", "b.npz", "c.npz", "mlxfun")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("stats merge", "save") else pytest.mark.slow)
        for name in PAIRS
    ],
)
def test_of_two_that_write_one_file_it_is_that_of_one_of_them(
    both: tuple[Warm, Warm], tmp_path: Path, name: str
) -> None:
    pair = PAIRS[name]
    alone = {}
    for who in "ab":
        here = new_place(tmp_path, both[0].directory, f"alone-{who}")
        ended, _, calls = at_once(both, here, 0, words(pair.lines, who), ["--version"])
        assert ended.code == 0, ended.err
        alone[who] = content(here / pair.out)
    assert alone["a"] != alone["b"]
    for stop_at in points(calls, STOPS):
        here = new_place(tmp_path, both[0].directory, str(stop_at))
        one, other, _ = at_once(both, here, stop_at, words(pair.lines, "a"), words(pair.lines, "b"))
        where = f"{name}, stopped at {stop_at} of {calls}: {one.err[-300:]} / {other.err[-300:]}"
        found = content(here / pair.out)
        codes = {"a": one.code, "b": other.code}
        done = [who for who in "ab" if codes[who] == 0]
        assert found in [alone[who] for who in done], where
        assert visible(here) == {pair.out}, where
        if pair.wins:
            assert done == ["a", "b"], where
        else:
            assert len(done) == 1, where
            refused = other if done == ["a"] else one
            assert refused.code == 1
            assert "choose another" in refused.last, where


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an older one"])
def test_two_recordings_to_one_file_lose_no_line(
    both: tuple[Warm, Warm], tmp_path: Path, old: bool
) -> None:
    lines = {"a": ["set seed 1", "set metric freq"], "b": ["set seed 2", "set metric ean"]}
    command = {
        who: ["--headless", "--record", "out.mlxfun", *[w for ln in lines[who] for w in ("-c", ln)]]
        for who in "ab"
    }
    refused, calls, stop_at = 0, 99, 0
    while stop_at < calls:
        stop_at += 1
        here = new_place(tmp_path, both[0].directory, str(stop_at))
        if old:
            (here / "out.mlxfun").write_text("#!mlxfun-session 2\nset seed 77\n")
        one, other, calls = at_once(both, here, stop_at, command["a"], command["b"])
        files = {p.name: p.read_text() for p in here.glob("*.mlxfun*")}
        held = [[ln for ln in text.splitlines() if ln[0] != "#"] for text in files.values()]
        for who, ended in (("a", one), ("b", other)):
            if ended.code == 0:
                assert held.count(lines[who]) == 1, (stop_at, files)
                continue
            refused += 1
            assert ended.code == 2, ended.err
            assert "out.mlxfun" in ended.last
            assert "choose another name" in ended.last or "File exists" in ended.last, ended.last
        assert held.count(["set seed 77"]) == old
        # Nobody's recording is moved away while it runs: the last to succeed has the name.
        last = lines["a" if one.code == 0 else "b"]
        assert files["out.mlxfun"].count(last[0]) == 1, (stop_at, files)
        assert visible(here) == set(files), "no litter"
    assert refused > 3
    assert calls > 8


def test_a_session_that_runs_is_not_offered_resumed_or_dropped_by_another(
    both: tuple[Warm, Warm], tmp_path: Path
) -> None:
    typed = "set seed 3\nset metric freq\nquit\n"
    calls, stop_at = 99, 0
    while stop_at < calls:
        stop_at += 1
        here = new_place(tmp_path, both[0].directory, str(stop_at))
        other = ["--headless", "--resume"] if stop_at % 2 else ["--plain", "-c", "resume --drop"]
        one, late, calls = at_once(both, here, stop_at, ["--plain"], other, typed=typed)
        assert one.code == 0, one.err
        assert "stopped" not in one.err
        assert "no session was cut short" in late.err + late.out, (stop_at, late.err)
        assert not list(here.rglob("*.mlxfun")), "each has removed its own"
    assert calls > 4


def test_the_cache_of_identities_is_whole_whoever_writes_last(
    both: tuple[Warm, Warm], tmp_path: Path
) -> None:
    import json

    command = words(("load demo",), "a")
    for stop_at in range(1, 9, 2):
        here = new_place(tmp_path, both[0].directory, str(stop_at))
        one, other, _ = at_once(both, here, stop_at, command, command)
        assert (one.code, other.code) == (0, 0), one.err + other.err
        cache = json.loads((here / "mlxfun/identities.json").read_text())
        assert len(cache["checkpoints"]) == 1
        assert [p.name for p in (here / "mlxfun").iterdir()] == ["identities.json"]
