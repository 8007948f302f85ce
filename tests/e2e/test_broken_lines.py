"""A run over night does not end at a broken line, and says in its report which were left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun.data import demo
from tests.e2e.conftest import Shell


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    shell = Shell()
    shell.do("load demo")
    yield shell
    shell.engine.close()


def damaged(path: Path, name: str) -> Path:
    """A demo set with three lines more that are broken, each in its own way."""
    lines = demo.dataset_path(name).read_text().splitlines()[:40]
    assert len(lines) >= 30
    lines[3:3] = ['{"text": "cut o']
    lines[9:9] = ['{"text": 7}']
    lines[20:20] = [json.dumps({"messages": []})]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "collect --dataset {a} --max-tokens 16",
        "dataset {a}",
        "evaluate --dataset {a} --max-tokens 16",
        "domain-scan --domain-name x --domain {a} --general demo:medical --output d.json --max-samples 30",
        "merge --n-prune 2 --dataset {a} --max-tokens 16",
    ],
)
def test_every_command_on_data_leaves_them_out_and_accounts_for_all(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = damaged(tmp_path / "a.jsonl", "python")
    report = shell.do(line.format(a=file)).report
    assert report is not None
    use = report.data()["inputs"][0]
    assert use["refused"] == {
        "not valid JSON": 1,
        "'text' must be a string, found a number": 1,
        "'messages' must be a non-empty list, found an empty list": 1,
    }
    assert use["where"]["not valid JSON"] == ["4"]
    held = use["notes"].get("more held out", 0)
    assert use["read"] == use["used"] + use["left"] + use["blank"] + 3 + held
    shell.run("discard")
