"""Data as people have it, through whole commands: read in full, and every line accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxfun.data import demo
from mlxfun.data.datasets import read_lines
from mlxfun.data.options import DatasetOptions
from tests.e2e.conftest import Shell


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    shell = Shell()
    shell.do("load demo")
    yield shell
    shell.engine.close()


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def inputs(shell: Shell, line: str) -> list[dict[str, Any]]:
    report = shell.do(line).report
    assert report is not None
    found = report.data()["inputs"]
    assert isinstance(found, list)
    return found


def accounted(use: dict[str, Any]) -> bool:
    """Whether every line that was read is in one of the counts."""
    held = use["notes"].get("more held out", 0)
    refused = sum(use["refused"].values())
    return bool(use["read"] == use["used"] + use["left"] + use["blank"] + refused + held)


def as_parts(name: str, path: Path) -> Path:
    """A demo set of prompts, each as a list of typed parts."""
    lines = read_lines(DatasetOptions(f"demo:{name}"))
    asked = [(line.messages or [{"content": line.payload}])[0]["content"] for line in lines]
    parts = [{"type": "text", "text": text} for text in asked]
    return jsonl(path, *({"messages": [{"role": "user", "content": [part]}]} for part in parts))


def test_prompts_as_parts_are_refused_as_often_as_the_same_as_text(
    shell: Shell, tmp_path: Path
) -> None:
    harmful = as_parts("harmful", tmp_path / "a.jsonl")
    harmless = as_parts("harmless", tmp_path / "b.jsonl")
    rest = "--max-samples 12 --answer-tokens 12"
    plain = shell.do(f"refusals --harmful demo:harmful --harmless demo:harmless {rest}").report
    found = shell.do(f"refusals --harmful {harmful} --harmless {harmless} {rest}").report
    assert plain is not None
    assert found is not None
    assert found.data()["before"] == plain.data()["before"]
    assert plain.data()["before"]["harmful"] >= 10


def test_both_data_sets_are_used_and_named(shell: Shell) -> None:
    found = inputs(shell, "collect --dataset demo:python --dataset demo:medical --max-tokens 24")
    assert [use["source"] for use in found] == ["demo:python", "demo:medical"]
    assert all(use["used"] > 0 for use in found)
    assert all(accounted(use) for use in found)
    settings = shell.do("set").report
    assert settings is not None
    assert list(settings.data()["settings"]["dataset"]) == ["demo:python", "demo:medical"]
    again = inputs(shell, "collect --max-tokens 24")
    assert [(u["source"], u["used"]) for u in again] == [(u["source"], u["used"]) for u in found]


@pytest.mark.parametrize(
    "line",
    [
        "merge --n-prune 2 {two} --max-samples 8 --max-tokens 24",
        "probe {two}",
        "dossier 2:3 {two}",
        "safety-scan --harmful demo:harmful --harmful demo:python --benign demo:harmless "
        "--max-samples 8 --output s.json",
        "evaluate {two} --max-samples 4 --max-tokens 24",
        "refusals --harmful demo:harmful --harmful demo:python --harmless demo:harmless "
        "--max-samples 8 --answer-tokens 2",
    ],
)
def test_every_command_that_takes_data_takes_several(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if line.startswith("probe"):
        shell.do("select --clear --drop 1:1")
    used = inputs(shell, line.format(two="--dataset demo:python --dataset demo:medical"))
    assert len([use for use in used if use["read"] > 0]) >= 2
    shell.run("discard")


def test_a_comparison_counts_the_lines_that_it_reads_twice_once(shell: Shell) -> None:
    line = " --dataset demo:python --dataset demo:medical --max-samples 2 --max-tokens 16"
    assert inputs(shell, f"compare 0 0{line}") == inputs(shell, f"evaluate{line}")


def test_weights_are_kept_and_a_measurement_refuses_them(shell: Shell) -> None:
    two = "--dataset demo:python:2 --dataset demo:medical"
    first, second = inputs(shell, f"collect {two} --max-tokens 16")
    assert accounted(first)
    assert accounted(second)
    drawn = [use["read"] - use["left"] for use in (first, second)]
    assert drawn[0] // 2 == drawn[1] > 10
    assert "leave its weight out" in shell.refused(f"evaluate {two}", usage=True)


def test_blank_lines_are_neither_drawn_nor_held_out(shell: Shell, tmp_path: Path) -> None:
    text = "a sample with several words in it, number"
    records = [r for n in range(40) for r in ({"text": ""}, {"text": f"{text} {n}"})]
    file = jsonl(tmp_path / "a.jsonl", *records)
    (use,) = inputs(shell, f"collect --dataset {file} --max-samples 32")
    assert (use["read"], use["used"], use["blank"], use["left"]) == (80, 32, 40, 4)
    assert use["notes"] == {"more held out": 4}
    (use,) = inputs(shell, f"collect --dataset {file} --max-samples 50")
    assert use["notes"]["fewer than --max-samples 50"] == 50 - use["used"]
    file = jsonl(tmp_path / "b.jsonl", {"text": text}, {"text": ""})
    (use,) = inputs(shell, f"collect --dataset {file}")
    assert (use["read"], use["used"], use["blank"]) == (2, 1, 1)


def test_a_shortfall_and_a_cut_are_in_the_printed_report(shell: Shell, tmp_path: Path) -> None:
    from rich.console import Console

    from commands.output.render.dispatch import render

    file = jsonl(tmp_path / "a.jsonl", {"text": "word " * 90}, {"text": ""}, {"text": "some words"})
    report = shell.do(f"evaluate --dataset {file} --max-samples 9 --max-tokens 16").report
    assert report is not None
    console = Console(width=400)
    with console.capture() as capture:
        console.print(render(report))
    expected = (
        f"data: {file}: 3 lines read, 2 used, 1 blank, 1 cut, 0 refused; "
        "7 fewer than --max-samples 9"
    )
    assert expected in capture.get()


def test_a_model_without_a_template_says_so_in_every_report_on_chats(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(demo.model_path(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.jinja").write_text(template)
    shell = Shell()
    loaded = shell.do(f"load {folder}").report
    assert loaded is not None
    assert any("no chat template" in note for note in loaded.data()["notes"])
    line = "evaluate --dataset demo:harmless --max-samples 4"
    (use,) = inputs(shell, line)
    assert use["notes"] == {
        "as turns joined by newlines, since the model has no chat template": use["used"]
    }
    shell.do(f"load {folder} --chat-template {tmp_path / 'own.jinja'}")
    (use,) = inputs(shell, line)
    assert use["notes"] == {}
    shell.engine.close()


def test_dataset_shows_the_first_sample_as_the_model_sees_it(shell: Shell, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl", {"prompt": "hi", "completion": "there"}, {"text": "plain text"}
    )
    report = shell.do(f"dataset {file}").report
    assert report is not None
    found = report.data()
    assert found["first"] == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthere<|im_end|>\n"
    )
    assert found["forms"] == {"prompt and completion": 1, "text under 'text'": 1}
    assert (found["unit"], found["samples"]) == ("tokens", 2)
    alone = Shell()
    report = alone.do(f"dataset {file}").report
    assert report is not None
    assert (report.data()["unit"], report.data()["lengths"]["total"]) == ("characters", 35)
    alone.engine.close()


def test_a_byte_order_mark_is_no_part_of_a_session_or_a_configuration(
    shell: Shell, tmp_path: Path
) -> None:
    from commands.config import read_config

    (tmp_path / "bom.mlxfun").write_text("\ufeff#!mlxfun-session 1\n#: model demo\ninfo\n")
    shell.do("load demo", f"replay {tmp_path / 'bom.mlxfun'}")
    (tmp_path / "bom.toml").write_text('\ufefftheme = "mlxfun-light"\n')
    assert read_config(tmp_path / "bom.toml").theme == "mlxfun-light"
