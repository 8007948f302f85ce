"""No text of a file, a model or a person drives the terminal: one sanitiser at each boundary."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hostile_text import ALONE, ARGUMENT, EVIL, shown_characters
from rich.panel import Panel
from rich.text import Text

from commands.output.console import print_dim, print_text
from commands.runners.event_printer import EventPrinter
from mlxfun.events import Event, JobEnded, JobStarted, Notice, Progress, Token
from mlxfun.generation.reports import ChatReport
from mlxfun.report import TextReport
from mlxfun.text import escaped, one_line, visible
from tests.commands.conftest import Bench
from tests.commands.table.test_export import heat
from tests.warm.programs import STUB, command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("char", ALONE, ids=lambda c: f"U+{ord(c):04X}")
def test_every_dangerous_character_is_replaced_by_one_that_is_seen(char: str) -> None:
    assert visible(f"a{char}b")[0::2] == "ab"
    assert visible(f"a{char}b").isprintable()
    assert json.loads(escaped(json.dumps(f"a{char}b", ensure_ascii=False))) == f"a{char}b"
    assert escaped(json.dumps(f"a{char}b", ensure_ascii=False)).isprintable()


def test_what_is_harmless_stays() -> None:
    harmless = "naïve 日本語 👩\u200d🚀 a\u00a0b\u202f1\n\tx"
    assert visible(harmless) == harmless
    assert one_line("a\nb\tc") == "a␊b␉c"


EVENTS: dict[str, Callable[[], Event]] = {
    "notice": lambda: Notice("warning", EVIL),
    "progress": lambda: Progress(1, EVIL, 1, 2, EVIL, 1.0),
    "line": lambda: JobStarted(1, EVIL),
    "token": lambda: Token(1, "base", 0, 1, EVIL),
    "error": lambda: JobEnded(1, EVIL, None, EVIL, 0.0, EVIL),
    "report": lambda: JobEnded(1, EVIL, TextReport(EVIL), None, 0.0, EVIL),
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("as_json", [False, True])
def test_no_event_brings_one_to_stdout_or_stderr(bench: Bench, name: str, as_json: bool) -> None:
    out, err = io.StringIO(), io.StringIO()
    printer = EventPrinter(bench.engine, as_json=as_json, stream=not as_json, out=out, err=err)
    printer._print(EVENTS[name](), 2)
    assert name == "progress" or as_json or out.getvalue() + err.getvalue()
    assert shown_characters(out.getvalue() + err.getvalue()) == set()


@pytest.mark.parametrize("terminal", [False, True])
def test_no_renderer_can_forget_it(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for content in (Text(EVIL), Panel(EVIL), EVIL):
        stream = io.StringIO()
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        print_text(content, stream)
        assert stream.getvalue().count("\n") <= 12
        assert shown_characters(stream.getvalue()) == set()
    print_dim(EVIL, stream)
    assert shown_characters(stream.getvalue()) == set()


@pytest.mark.parametrize(
    "line",
    ["set dataset {}", "load {}", "{}", "prune --n-prune {}", "prune --{}", "replay {}", "help {}",
     "replay s.mlxfun", "recipe s.recipe", "expect error {}", "record {}/x", "stats {}",
     "chat {}", "export report {}.md", "resume --drop {}", "name {}"],
)  # fmt: skip
def test_no_line_brings_one_back(bench: Bench, here: Path, line: str) -> None:
    (here / "s.mlxfun").write_text(json.dumps(f"set dataset '{ARGUMENT}'") + "\nset\n")
    (here / "s.recipe").write_text(json.dumps(f"at most '{ARGUMENT}'") + "\n")
    out, err = io.StringIO(), io.StringIO()
    printer = EventPrinter(bench.engine, stream=True, out=out, err=err)
    printer.follow(bench.engine.run(line.format(f"'{ARGUMENT}'")))
    assert out.getvalue() + err.getvalue()
    assert shown_characters(out.getvalue() + err.getvalue()) == set()


@pytest.mark.parametrize(
    "arguments",
    [("--replay", "{}"), ("--record", "{}/x"), ("--output-root", "{}"), ("{}", "{}"), ("--{}",),
     ("-c", "{}"), ("--seed", "{}"), ("--undo-budget", "{}"), ("--demo", "{}"),
     ("--replay", "s.mlxfun", "--record", "no/{}"), ("--json", "-c", "{}")],
)  # fmt: skip
def test_no_start_error_holds_one(here: Path, arguments: tuple[str, ...]) -> None:
    (here / "s.mlxfun").write_text("set\n")
    done = started(here, "--headless", *(word.format(ARGUMENT) for word in arguments))
    assert "Traceback" not in done.stderr
    assert shown_characters(done.stdout + done.stderr) == set()


@pytest.mark.parametrize(
    "content",
    [
        '"{}" = 1',
        "theme = {}",
        '[keys]\n"{}" = 3',
        '[defaults]\n"{}" = 3',
        '[defaults]\nmetric = "{}"',
        'undo_budget = "{}"',
    ],
)
def test_no_error_of_the_configuration_holds_one(here: Path, content: str) -> None:
    inside = "".join(f"\\u{ord(c):04x}" for c in ARGUMENT) if '"' in content else ARGUMENT
    (here / "c.toml").write_text(content.replace("{}", inside), "utf-8")
    done = started(here, "--plain", "--config", "c.toml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert shown_characters(done.stdout + done.stderr) == set()


def started(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*command(STUB), *arguments],
        cwd=here, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
        env={"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(here), "PATH": "", "PYTHONUTF8": "1"},
    )  # fmt: skip
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.mark.parametrize("name", ["h.svg", "h.md", "h.csv", "c.md", "c.json", "r.md"])
def test_no_exported_text_holds_one(
    bench: Bench, here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.do("collect --dataset demo:mixed --max-samples 2", f"set dataset '{ARGUMENT}'")
    workbench = bench.engine._bench
    view = workbench.view()
    assert view.model is not None
    drawn = replace(view, heat=heat(), model=replace(view.model, model_id=EVIL, model_type=EVIL))
    monkeypatch.setattr(workbench, "view", lambda: drawn)
    workbench.answers.append(ChatReport(EVIL, EVIL, EVIL, 1, 1, 1, 1.0, EVIL))
    kind = {"h": "heatmap", "c": "chat", "r": "report"}[name[0]]
    bench.do(f"export {kind} {name}")
    text = Path(name).read_bytes().decode()
    assert shown_characters(text) == set()
    if name.endswith(".svg"):
        ElementTree.fromstring(text)
    if name.endswith(".json"):
        assert json.loads(text)[0]["text"] == EVIL
