"""Killed at any system call, whatever writes leaves the old file or the new one, and no litter."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlxfun.checkpoint.replacing import atomic
from tests.hostile.warm import Ended, Warm
from tests.mlxfun import tiny_checkpoints as tiny
from tests.warm.programs import ROOT

RECORDED = b"#!mlxfun-session 2\n#: seed 5\nset seed 4\n"
KILLS, KILLS_OF_A_MODEL = 9, 4
"""Of each writer by default, over all its calls; loading the model each time takes longer."""
Files = dict[str, bytes]


@dataclass(frozen=True)
class Writer:
    """line or call: what writes. out: the file or directory it writes. old: what is there before.

    model: it needs the demo model and statistics. environment: names that are set to the place.
    """

    out: str
    line: tuple[str, ...] = ()
    call: tuple[object, ...] = ()
    old: str | bytes | None = None
    arguments: tuple[str, ...] = ("--headless",)
    environment: tuple[str, ...] = field(default=())
    model: bool = False
    typed: str = ""


ON_MODEL = ("load demo", "stats load a.npz")
DEFAULT = ("stats save", "plan save", "export report", "save", "save --force")
"""Writers that are killed in every run of the tests; all of them in the slow run."""
WRITERS = {
    "stats merge": Writer("out.npz", ("stats merge a.npz b.npz --output out.npz",), old="a.npz"),
    "stats save": Writer("out.npz", (*ON_MODEL, "stats save out.npz"), old="b.npz", model=True),
    "stats diff": Writer("out.json", ("stats diff a.npz b.npz --output out.json",),
                         old=b'{"share_difference": {}}'),
    "stats rank": Writer("out.json", ("stats rank a.npz b.npz --n-prune 2 --output out.json",),
                         old=b'{"keep_map": {}}'),
    "plan save": Writer("out.csv", (*ON_MODEL, "prune --n-prune 2", "plan save out.csv"),
                        old=b"layer,expert,action\n0,1,keep\n", model=True),
    "scan report": Writer("out.json", ("load demo", "domain-scan --domain demo:python --general "
                          "demo:mixed --domain-name p --max-samples 4 --max-tokens 8 --output out.json"),
                          old=b'{"composite_score": []}', model=True),
    "export report": Writer("out.md", ("export report out.md --force",), old=b"mine"),
    "export heatmap": Writer("deep/er/out.svg", (*ON_MODEL, "export heatmap deep/er/out.svg --force"), model=True),
    "recipe": Writer("out", (*ON_MODEL, "recipe r.recipe --output out"), model=True),
    "prepare-dataset": Writer("out.jsonl", call=("tests.hostile.kill_writers:prepare_dataset",),
                              old=b'{"text": "old"}\n'),
    "save": Writer("out", call=("tests.hostile.kill_writers:save", False)),
    "save --force": Writer("out", call=("tests.hostile.kill_writers:save", True), old="smaller"),
    "identities": Writer("mlxfun/identities.json", ("load demo",), environment=("XDG_CACHE_HOME",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(warm: Warm) -> Path:
    """A directory with the files that the writers read."""
    here = warm.directory
    warm.lines(
        "load demo", "collect --dataset demo:mixed --max-samples 2 --max-tokens 16 --seed 1",
        "stats save a.npz", "collect --dataset demo:mixed --max-samples 2 --max-tokens 16 --seed 2",
        "stats save b.npz",
    )  # fmt: skip
    (here / "r.recipe").write_text(
        "at most 9 GB\njudge --dataset demo:eval --max-samples 1 --max-tokens 8\ntry prune --n-prune 1\n"
    )
    tiny.write(here / "base", tiny.QWEN3)
    tiny.write(here / "smaller", tiny.QWEN3 | {"num_experts": 4})
    return here


def place(sources: Path, here: Path, writer: Writer) -> None:
    """Make `here` a directory with what the writer needs, and the old file."""
    here.mkdir()
    for name in ("a.npz", "b.npz", "r.recipe"):
        (here / name).hardlink_to(sources / name)
    if writer.call and writer.out == "out":
        (here / "base").symlink_to(sources / "base")
    if isinstance(writer.old, bytes):
        (here / writer.out).write_bytes(writer.old)
    elif writer.old == "smaller":
        shutil.copytree(sources / "smaller", here / "out")
    elif writer.old is not None:
        shutil.copy(sources / writer.old, here / writer.out)


def run(warm: Warm, here: Path, writer: Writer, kill_at: int) -> Ended:
    words = [*writer.arguments, *[word for line in writer.line for word in ("-c", line)]]
    return warm.run(
        *words, call=writer.call, directory=here, typed=writer.typed,
        before=("tests.hostile.kill_points:arm", kill_at, str(here), str(warm.home / "count")),
        environment=dict.fromkeys(writer.environment, str(here)),
    )  # fmt: skip


def under(path: Path) -> Files:
    """{relative path: content} of a file or of all below a directory; empty for nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def names(here: Path) -> list[str]:
    return sorted(str(path.relative_to(here)) for path in here.rglob("*"))


def points(calls: int, most: int) -> list[int]:
    """Of 1..calls so many, evenly spread; the first and the last among them."""
    if calls <= most:
        return list(range(1, calls + 1))
    return sorted({1 + round(i * (calls - 1) / (most - 1)) for i in range(most)})


def kill_everywhere(warm: Warm, sources: Path, there: Path, name: str, most: int) -> int:
    """Kill the writer at calls spread over all of them; how many kills there were."""
    writer = WRITERS[name]
    place(sources, there / "whole", writer)
    old = under(there / "whole" / writer.out)
    ended = run(warm, there / "whole", writer, 0)
    assert ended.code == 0, ended.err
    calls = int((warm.home / "count").read_text().split()[1])
    new, left = under(there / "whole" / writer.out), names(there / "whole")
    assert new != old
    kills = points(calls, most)
    for kill_at in kills:
        here = there / str(kill_at)
        place(sources, here, writer)
        ended = run(warm, here, writer, kill_at)
        where = f"{name}, call {kill_at} of {calls}"
        assert ended.code == -signal.SIGKILL, f"{where}: {ended.code} {ended.err}"
        require_old_or_new(here, name, old, new, where)
        again(warm, here, writer, left, where)
        shutil.rmtree(here)
    return len(kills)


def require_old_or_new(here: Path, name: str, old: Files, new: Files, where: str) -> None:
    """What was to be written is as before or as it is to be, once a backup has its name again."""
    for backup in atomic.recoverable(here):
        atomic.recover(backup)
    found = under(here / WRITERS[name].out)
    if name == "recipe":  # several files, each of them whole, with the seconds it took
        shown = {name: text for name, text in found.items() if not name.startswith(".")}
        assert shown.keys() <= new.keys()
        assert all(t.rstrip().endswith((b"}", b"</svg>")) for t in shown.values()), where
    else:
        assert found in (old, new), f"{where}: {sorted(found)}"
    if name == "save" and found:
        shutil.rmtree(here / "out")  # it refuses to write over a model


def again(warm: Warm, here: Path, writer: Writer, left: list[str], where: str) -> None:
    """The next run does it all, and takes away what the killed one left."""
    ended = run(warm, here, writer, 0)
    assert ended.code == 0, f"{where}: {ended.err}"
    assert names(here) == left, where


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in WRITERS]
)
def test_some_kills(warm: Warm, sources: Path, tmp_path: Path, name: str) -> None:
    most = KILLS_OF_A_MODEL if WRITERS[name].model else KILLS
    assert kill_everywhere(warm, sources, tmp_path, name, most) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_kills_at_all_calls(warm: Warm, sources: Path, tmp_path: Path, name: str) -> None:
    assert kill_everywhere(warm, sources, tmp_path, name, 150) >= 5


SYSCALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,chmod,mkdir"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("name", WRITERS)
def test_kills_at_real_system_calls(warm: Warm, sources: Path, tmp_path: Path, name: str) -> None:
    """The same by the kernel's own count: strace delivers the signal when the call is entered."""
    writer, log = WRITERS[name], tmp_path / "log"
    place(sources, tmp_path / "whole", writer)
    old = under(tmp_path / "whole" / writer.out)
    code = traced(tmp_path / "whole", writer, "-y", "-e", f"trace={SYSCALLS}", "-o", str(log))
    assert code == 0
    new, left = under(tmp_path / "whole" / writer.out), names(tmp_path / "whole")
    assert new != old
    kills = calls_below(log, tmp_path / "whole")
    assert len(kills) >= 5
    killed = 0
    for number in points(len(kills), 8):
        call, when = kills[number - 1]
        where = f"{name}, {call} {when}"
        here = tmp_path / f"{call}-{when}"
        place(sources, here, writer)
        inject = f"inject={call}:signal=KILL:when={when}"
        code = traced(here, writer, "-e", inject, "-o", str(tmp_path / "ended"))
        assert code in (0, -signal.SIGKILL, 137), (where, code)
        killed += code != 0
        require_old_or_new(here, name, old, new, where)
        again(warm, here, writer, left, where)
    # How often a thread makes a call may differ by one or two from run to run.
    assert killed >= min(5, len(kills))


def calls_below(log: Path, here: Path) -> list[tuple[str, int]]:
    """The calls in strace's log that touch something below `here`, each with its number among the
    calls of its name in its thread, which is how strace counts.
    """
    calls: dict[tuple[str, str], int] = {}
    found = []
    for line in log.read_text(errors="replace").splitlines():
        thread, _, rest = line.partition(" ")
        call = rest.strip().partition("(")[0]
        calls[thread, call] = calls.get((thread, call), 0) + 1
        if str(here) in rest:  # -y says where a descriptor leads, the working directory too
            found.append((call, calls[thread, call]))
    return found


def traced(here: Path, writer: Writer, *options: str) -> int:
    """Run the writer in a process of its own below strace, with empty caches; its exit code."""
    words = [*writer.arguments, *[word for line in writer.line for word in ("-c", line)]]
    program = ["-m", "commands.cli", *words]
    if writer.call:
        module, _, function = str(writer.call[0]).partition(":")
        program = ["-c", f"import {module} as m; m.{function}(*{writer.call[1:]!r})"]
    home = here.with_name("home")
    shutil.rmtree(home, ignore_errors=True)
    kept = dict.fromkeys(("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(home))
    environment = {
        **os.environ, **kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(writer.environment, str(here)),
    }  # fmt: skip
    return subprocess.run(
        ["strace", "-f", "-qq", "--seccomp-bpf", *options, sys.executable, *program],
        cwd=here, env=environment, capture_output=True, timeout=120, check=False,
    ).returncode  # fmt: skip


# --- recordings and kept sessions, which are written line by line ------------------------------


def journal(path: Path) -> list[str]:
    """The lines of a session file, each of which must be whole."""
    text = path.read_text()
    assert not text or text.endswith("\n"), text
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("old", [None, RECORDED], ids=["new", "over an older one"])
def test_a_recording_that_is_cut_short_holds_whole_lines(
    warm: Warm, tmp_path: Path, old: bytes | None
) -> None:
    writer = Writer("out.mlxfun", ("set seed 3", "set metric freq"),
                    arguments=("--headless", "--record", "out.mlxfun"))  # fmt: skip
    lines = ["set seed 3", "set metric freq"]
    for kill_at in range(1, 99):
        here = tmp_path / str(kill_at)
        here.mkdir()
        if old:
            (here / "out.mlxfun").write_bytes(old)
        ended = run(warm, here, writer, kill_at)
        found = names(here)
        if old:
            assert [n for n in found if (here / n).read_bytes() == old], (kill_at, found)
        if (here / "out.mlxfun").exists() and (here / "out.mlxfun").read_bytes() != old:
            half = (here / "out.mlxfun").read_bytes()
            whole = half[: half.rfind(b"\n") + 1]  # the last line may be half on the disk
            written = [ln for ln in whole.decode().splitlines() if not ln.startswith("#")]
            assert written == lines[: len(written)]
        shown = {name for name in found if not name.startswith(".")}
        assert shown <= {"out.mlxfun", "out.mlxfun.1"}
        if ended.code == 0:
            assert journal(here / "out.mlxfun") == lines
            break
        again = run(warm, here, writer, 0)
        assert again.code == 0, again.err
        assert journal(here / "out.mlxfun") == lines
        assert not [name for name in names(here) if name.startswith(".")], kill_at
    assert kill_at > 8


def test_a_kept_session_can_be_resumed_after_a_kill_at_any_call(warm: Warm, tmp_path: Path) -> None:
    writer = Writer("", arguments=("--plain",), environment=("XDG_STATE_HOME", "HOME"),
                    typed="set seed 3\nset metric freq\nquit\n")  # fmt: skip
    resumed = 0
    for kill_at in range(1, 99):
        here = tmp_path / str(kill_at)
        here.mkdir()
        ended = run(warm, here, writer, kill_at)
        if ended.code == 0:
            break
        kept = list(here.rglob("*.mlxfun"))
        again = run(warm, here, Writer("", arguments=("--headless", "--resume"),
                                       environment=("XDG_STATE_HOME", "HOME")), 0)  # fmt: skip
        if again.code == 0:
            resumed += 1
        else:
            assert "no session was cut short" in again.err, (kill_at, kept, again.err)
        assert not list(here.rglob("*.mlxfun")), (kill_at, again.err)
        assert not list(here.rglob("*partial*")), kill_at
    assert kill_at > 5
    assert resumed > 2
    assert not list(here.rglob("*.mlxfun"))
