"""The program as a person or a script starts it: a process, its streams and its exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.warm.programs import STUB, command

ROOT = Path(__file__).resolve().parents[2]
SESSION = (
    "collect --dataset demo:mixed --max-samples 4",
    "prune --n-prune 4 --metric reap_sum",
    "preview --dataset demo:eval",
    "apply",
    "undo",
    "redo",
    "save out",
)
KEYS = {"command", "ok", "state", "seconds", "report", "data"}


class Program:
    """Runs mlxfun-shell on the stub session in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.command = command(STUB)
        clean = {k: v for k, v in os.environ.items() if k not in ("STUB_GATE", "NO_COLOR")}
        self.environment = {
            **clean, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory), "HOME": str(directory),
            "XDG_STATE_HOME": str(directory / "state"), "TERM": "xterm",
        }  # fmt: skip

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments], cwd=self.directory, env=self.environment, input=stdin,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *arguments], cwd=self.directory, env={**self.environment, **extra},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def commands(lines: Sequence[str]) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of complaint on stderr."""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_the_whole_session_runs_headless_and_its_replay_reproduces_every_state(
    program: Program,
) -> None:
    head = ("--headless", "--json", "--seed", "1")
    done = program.run(*head, "--demo", "--record", "s.mlxfun", *commands(SESSION))
    assert done.returncode == 0, done.stderr
    first = objects(done)
    assert [o["command"] for o in first] == ["load demo", *SESSION]
    assert all(set(o) == KEYS and o["ok"] for o in first)
    assert (program.directory / "out" / "config.json").is_file()
    again = program.run("--headless", "--json", "--replay", "s.mlxfun")
    assert again.returncode == 0, again.stderr
    second = objects(again)
    assert [(o["command"], o["state"]) for o in second[:-1]] == [
        (o["command"], o["state"]) for o in first
    ]
    assert second[-1]["command"] == "replay s.mlxfun"
    assert second[-1]["data"]["compared"] == len(SESSION)
    assert "what it saves goes below" in again.stderr


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("info", {"model_type", "moe_layers", "experts", "top_k", "parameters", "bytes", "dtype"}),
        ("collect --dataset demo:mixed", {"samples", "tokens", "tokens_per_second", "coverage"}),
        ("prune --n-prune 1", {"kept", "bytes_before", "bytes_after"}),
        ("preview", {"perplexity", "tokens", "kl_mean", "kl_p99", "top1_agreement"}),
        ("evaluate", {"perplexity", "tokens", "kl_mean", "kl_p99", "top1_agreement"}),
        ("save out", {"path", "bytes", "gate"}),
        ("history", {"nodes", "current"}),
    ],
)
def test_the_data_of_a_command_has_its_documented_keys(
    program: Program, line: str, keys: set[str]
) -> None:
    before = ("collect --dataset demo:mixed", "prune --n-prune 1")
    done = program.run("--headless", "--json", "--demo", *commands((*before, line)))
    data = objects(done)[-1]["data"]
    assert keys <= set(data)
    if "perplexity" in keys:
        assert "all" in data["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--headless",), "--headless has nothing to do: give -c COMMAND or --replay FILE"),
        (("--headless", "--replay", "a/../s.mlxfun", "--record", "s.mlxfun"),
         "--record and --replay both name s.mlxfun"),
        (("--headless", "--plain"), "--plain and --headless exclude each other"),
        (("--demo", "--json"), "--json needs --headless"),
        (("--demo", "--keep-going"), "--keep-going needs --headless"),
        (("--demo", "other"), "--demo and the model other exclude each other"),
        (("--demo",), "no terminal to draw on: add --headless to run -c or --replay in a script, "
                      "or --plain to read commands line by line"),
        (("-c", "info"), "no terminal to draw on: add --headless to run -c or --replay in a "
                         "script, or --plain to read commands line by line"),
        (("--headles",), "No such option '--headles'. (Did you mean one of: '--headless', "
                         "'--help'?)"),
        (("--headless", "--demo", "--undo-budget", "2XB"),
         "--undo-budget: '2XB' is not a size, for instance 500MB, 2GiB or 4096"),
        (("--headless", "--demo", "-c", "prun"),
         "unknown command 'prun': did you mean prune?; type help for a list"),
        (("--headless", "--replay", "no.mlxfun"),
         "cannot read the replay file no.mlxfun: No such file or directory"),
        (("--headless", "--demo", "--record", "no/s.mlxfun"),
         "--record: cannot record to no/s.mlxfun: No such file or directory"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_exit_code_2_and_no_work(
    program: Program, arguments: tuple[str, ...], message: str
) -> None:
    done = program.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence(done) == f"mlxfun-shell: {message}"
    assert list(program.directory.iterdir()) == []


def test_a_typo_in_the_last_command_is_found_before_the_first_one_runs(program: Program) -> None:
    lines = ("collect --dataset demo:mixed", "aply")
    done = program.run("--headless", "--json", "--demo", "--record", "s.mlxfun", *commands(lines))
    assert done.returncode == 2
    (found,) = objects(done)
    assert set(found) == {*KEYS, "error"}
    assert found["error"] == "unknown command 'aply': did you mean apply?; type help for a list"
    assert (found["ok"], found["report"], found["data"]) == (False, None, {})
    assert not (program.directory / "s.mlxfun").exists()


def test_the_first_failure_stops_with_exit_code_1(program: Program) -> None:
    done = program.run("--headless", "--json", "--demo", *commands(("undo", "info")))
    assert done.returncode == 1
    assert [(o["command"], o["ok"]) for o in objects(done)] == [
        ("load demo", True),
        ("undo", False),
    ]
    assert sentence(done) == "error: nothing to undo: this is the model as loaded"


def test_keep_going_runs_the_rest_and_still_fails(program: Program) -> None:
    arguments = ("--headless", "--json", "--demo", "--keep-going")
    done = program.run(*arguments, *commands(("undo", "info")))
    assert done.returncode == 1
    assert [o["ok"] for o in objects(done)] == [True, False, True]


def test_a_usage_error_found_while_running_has_exit_code_2(program: Program) -> None:
    done = program.run("--headless", "--demo", *commands(("collect",)))
    assert done.returncode == 2
    assert sentence(done) == "error: which data set? Give --dataset PATH, or --dataset demo:mixed"


def test_a_failure_that_the_next_command_expects_is_none(program: Program) -> None:
    lines = ("undo", "expect error nothing to undo", "info")
    assert program.run("--headless", "--demo", *commands(lines)).returncode == 0


def test_the_seed_of_a_recording_cannot_be_contradicted(program: Program) -> None:
    (program.directory / "s.mlxfun").write_text("#: seed 4\nload demo\n")
    done = program.run("--headless", "--replay", "s.mlxfun", "--seed", "5")
    assert done.returncode == 2
    assert sentence(done) == (
        "mlxfun-shell: --seed 5 contradicts the seed 4 of s.mlxfun: leave it out"
    )
    assert program.run("--headless", "--replay", "s.mlxfun", "--seed", "4").returncode == 0


def test_without_json_results_are_text_on_stdout_and_progress_goes_to_stderr(
    program: Program,
) -> None:
    lines = ("collect --dataset demo:mixed --max-samples 3", "prune --n-prune 2", "chat [b]hi[/b]")
    done = program.run("--headless", "--demo", *commands(lines))
    assert done.stdout.splitlines()[-9:-1] == [
        "> prune --n-prune 2",
        "staged prune: 6 experts pruned (8 -> 6 per layer), 23.4 KiB -> 17.6 KiB",
        "layer  pruned  share lost  experts",
        "    1       2       12.5%  0 1",
        "    3       2       12.5%  0 1",
        "    5       2       12.5%  0 1",
        "> chat [b]hi[/b]",
        "turn 0: [b]hi[/b]",
    ]
    assert "\x1b" not in done.stdout
    assert done.stderr.splitlines()[0] == "collect: 1 of 3 samples (33%)"
    assert "collect: 3 of 3 samples (100%)" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_a_command_runs_is_one_sentence(
    program: Program, number: int, code: int
) -> None:
    lines = ("collect --dataset demo:mixed --max-samples 50", "save out")
    arguments = ("--headless", "--json", "--demo", "--record", "s.mlxfun", *commands(lines))
    process = program.start(*arguments, STUB_GATE="1")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("collect: 1 of 50")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines() == ["interrupted; nothing is left half done"]
    found = [json.loads(line) for line in out.splitlines()]
    assert found[-1]["data"]["cancelled"]
    assert not (program.directory / "out").exists()


def test_a_reader_that_leaves_ends_the_program_quietly(program: Program) -> None:
    process = program.start("--headless", "--json", "--demo", *commands(("info",) * 2000))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert err == ""
    process.stderr.close()


def test_plain_reads_commands_from_a_pipe(program: Program) -> None:
    done = program.run(
        "--plain", "--demo", stdin="# a comment\n\nset seed 4\nundo\nchat a b\nquit\ninfo\n"
    )
    assert done.returncode == 1
    assert "turn 0: a b\n" in done.stdout
    assert done.stdout.count("stub_moe") == 1
    assert done.stderr == "error: nothing to undo: this is the model as loaded\n"


class Terminal:
    """A pseudo-terminal with the program in it."""

    def __init__(self, program: Program, *arguments: str, **extra: str) -> None:
        self.screen = ""
        self.fd, inner = pty.openpty()
        # Not pty.fork(): forking a process that has threads is deprecated.
        self.process = subprocess.Popen(
            [*program.command, *arguments], cwd=program.directory, start_new_session=True,
            env={**program.environment, **extra, "STUB_TERMINAL": "1"},
            stdin=inner, stdout=inner, stderr=inner,
        )  # fmt: skip
        os.close(inner)

    def wait_for(self, text: str, seconds: float = 20) -> None:
        """Read until `text` has appeared; what came before it is forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], (
                f"{text!r} did not appear, but {self.screen!r}"
            )
            self.screen += os.read(self.fd, 4096).decode()
        self.screen = self.screen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def insist(self, send: Callable[[], None]) -> None:
        """Send until something happens.

        A signal that falls in the instant between readline's output and its wait for input is
        noticed by CPython only when the next input or signal comes.
        """
        for _ in range(20):
            send()
            if select.select([self.fd], [], [], 1.0)[0]:
                return

    def end(self) -> int:
        return self.process.wait(timeout=20)

    def close(self) -> None:
        """Leave no process behind when a test failed half way."""
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def shell(program: Program) -> Iterator[Terminal]:
    terminal = Terminal(program, "--plain", "--demo", STUB_GATE="1")
    terminal.wait_for("demo ")
    terminal.wait_for("> ")
    yield terminal
    terminal.close()


def test_plain_streams_a_chat_and_leaves_on_ctrl_d(shell: Terminal) -> None:
    shell.type("chat hello there\n")
    shell.wait_for("turn 0: hello there")
    shell.wait_for("tokens/s (stop)")
    shell.wait_for("> ")
    shell.type("\x04")
    assert shell.end() == 0


def test_ctrl_c_cancels_the_command_and_keeps_the_shell(shell: Terminal) -> None:
    shell.type("collect --dataset demo:mixed --max-samples 9\n")
    shell.wait_for("collect: 1 of 9 samples")
    shell.type("\x03")
    shell.wait_for("cancelling")
    shell.wait_for("cancelled after 1 of 9 samples")
    shell.wait_for("> ")
    shell.type("quit\n")
    assert shell.end() == 0


def test_ctrl_c_at_the_prompt_clears_the_line(shell: Terminal) -> None:
    shell.type("nonsense")
    shell.wait_for("nonsense")
    shell.insist(lambda: shell.type("\x03"))
    shell.wait_for("> ")
    shell.type("help undo\n")
    shell.wait_for("Usage: undo")
    shell.type("quit\n")
    assert shell.end() == 0


def test_tab_completes_and_the_history_is_kept(program: Program, shell: Terminal) -> None:
    shell.type("hist\t\n")
    shell.wait_for("1 node, at node 0")
    shell.type("quit\n")
    assert shell.end() == 0
    kept = (program.directory / "state" / "mlxfun" / "plain_history").read_text()
    assert "history" in kept


def test_sigterm_ends_the_plain_shell(shell: Terminal) -> None:
    shell.insist(lambda: shell.process.send_signal(signal.SIGTERM))
    shell.wait_for("interrupted; nothing is left half done")
    assert shell.end() == 143
