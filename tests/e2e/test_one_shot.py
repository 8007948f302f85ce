"""One-shot commands: scripts of mlx_fun run on the demo once the name of the program is replaced."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
import numpy as np
import pytest

from commands import cli, one_shot
from commands.registry import COMMANDS
from mlxfun.data import demo

# The commands of mlx_fun's README, one by one and with its own figures. Other than there are the model
# and the data, which are the demo's, --n-prune, 4 of 16 experts in place of 16 of 64, and what is
# asked. What follows the first blank line is not in the README.
SCRIPT = """
mlx-fun collect --model demo --dataset {solidity} --output ./saliency.npz --max-samples 128 --seed 42
mlx-fun safety-scan --model demo --harmful-dataset {harmful} --benign-dataset {harmless} \
    --output safety_report.json --max-samples 128 --seed 42
mlx-fun domain-scan --model demo --domain-dataset {solidity} --general-dataset {mixed} \
    --output domain_report.json --domain-name solidity --max-samples 128 --seed 42
mlx-fun prune --model demo --saliency ./saliency.npz --output ./pruned --n-prune 4 --metric reap \
    --strategy bottom
mlx-fun prune --model demo --saliency ./saliency.npz --output ./safe --n-prune 4 \
    --safety-map safety_report.json --safety-mode protect
mlx-fun prune --model demo --saliency ./saliency.npz --output ./unsafe --n-prune 4 \
    --safety-map safety_report.json --safety-mode target
mlx-fun prune --model demo --saliency ./saliency.npz --output ./kept --n-prune 4 \
    --domain-map domain_report.json --domain-mode protect
mlx-fun prune --model demo --saliency ./saliency.npz --output ./both --n-prune 4 \
    --safety-map safety_report.json --safety-mode protect \
    --domain-map domain_report.json --domain-mode protect
mlx-fun merge --model demo --saliency ./saliency.npz --dataset {solidity} --output ./merged \
    --n-prune 4 --similarity-mode gated --alignment greedy --max-group-size 16 --max-samples 64 \
    --seed 42
mlx-fun smoke-test --model ./pruned --prompt "pragma solidity ^0.8.0;"
mlx-fun steer --model demo --safety-map safety_report.json --mode safe --prompt "How are you?" \
    --max-tokens 100
mlx-fun abliterate --model demo --harmful-dataset {harmful} --benign-dataset {harmless} \
    --output ./abliterated --layers auto --target all --max-samples 64
mlx-fun amplify --model demo --domain-map domain_report.json --output ./amplified --scale 1.0 \
    --threshold 0.0

mlx-fun prune --model demo --saliency ./saliency.npz --output ./strided --n-prune 4 \
    --strategy strided --safety-map safety_report.json --safety-mode protect
mlx-fun collect --model demo --dataset {python} --output ./python.npz --max-samples 8 --max-tokens 64
mlx-fun stats-diff --file1 saliency.npz --file2 python.npz --metric freq --output diff.json
mlx-fun stats-merge --files saliency.npz --files python.npz --output both.npz --metric reap
mlx-fun stats-purge --input saliency.npz --output purged.npz --min-freq 10 --min-count 10
""".replace("\\\n", " ").strip()


def run(line: str) -> int:
    """The exit code of the program for a line, its name left out."""
    start = cli._one_shot(shlex.split(line)[1:])
    assert isinstance(start, cli.Start), line
    return cli.run(start)


@pytest.mark.slow
def test_the_commands_of_the_guide_of_mlx_fun_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = {name: str(demo.dataset_path(name)) for name in demo.DATASETS}
    for line in filter(None, SCRIPT.format(**sets).splitlines()):
        assert run(line) == 0, f"{line}\n{capsys.readouterr()}"
    counts = {
        name: json.loads((tmp_path / name / "config.json").read_text())["num_experts"]
        for name in (
            "pruned",
            "safe",
            "unsafe",
            "kept",
            "both",
            "strided",
            "merged",
            "abliterated",
            "amplified",
        )
    }
    assert counts == {"pruned": 12, "safe": 12, "unsafe": 12, "kept": 12, "both": 12, "strided": 12,
                      "merged": 12, "abliterated": 16, "amplified": 16}  # fmt: skip
    for name, method in (
        ("pruned", "reap"), ("merged", "ream"), ("abliterated", "abliteration"),
        ("amplified", "amplification"),
    ):  # fmt: skip
        assert (tmp_path / name / f"{method}_metadata.json").is_file()
    assert json.loads((tmp_path / "diff.json").read_text())["metric"] == "freq"
    purged = np.load(tmp_path / "purged.npz")["freq"]
    assert not ((purged > 0) & (purged < 10)).any()


def test_the_model_may_stand_before_the_command() -> None:
    first = one_shot.named(["demo", "collect", "--dataset", "x", "--output", "y.npz"])
    assert first == ("demo", "collect", ["--dataset", "x", "--output", "y.npz"])
    assert one_shot.named(["./prune"]) is None
    assert one_shot.named(["--demo", "prune"]) == ("demo", "prune", [])
    assert one_shot.named(["--headless", "prune"]) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x collect --output a.npz", "needs a model"),
        ("x prune --n-prune 2 --output out", "needs a model"),
        ("x demo collect --dataset demo:mixed", "--output"),
        ("x demo prune --bogus 1 --output out", "No such option"),
        ("x demo safety-scan --output a.json", "--harmful-dataset"),
        ("x stats-purge --input a.npz", "--output"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(line: str, message: str) -> None:
    with pytest.raises(click.ClickException) as caught:
        run(line)
    assert message in caught.value.format_message()


def test_a_metric_that_means_something_else_here_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli._one_shot(shlex.split("stats-diff --file1 a.npz --file2 b.npz --metric ean"))
    assert "mlx_fun's metric ean, a mean of output norms, is man here" in capsys.readouterr().err
    cli._one_shot(shlex.split("stats-diff --file1 a.npz --file2 b.npz --metric freq"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["prune", "merge", "stats-merge", "stats-diff"])
def test_ean_is_the_mean_that_mlx_fun_means(name: str) -> None:
    needed = {
        "stats-merge": "--files a.npz --files b.npz --output c.npz",
        "stats-diff": "--file1 a.npz --file2 b.npz",
    }.get(name, "--n-prune 2 --output out")
    asked = one_shot.parse("demo", name, [*needed.split(), "--metric", "ean"], "x")
    assert asked is not None
    assert "--metric man" in asked.lines[0]


def test_a_value_that_the_command_refuses_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="n-prune"):
        run("x demo prune --n-prune none --output out")


@pytest.mark.parametrize("name", sorted(one_shot.TABLE))
def test_every_row_names_a_command_and_options_that_it_has(name: str) -> None:
    row = one_shot.TABLE[name]
    known = {word for param in COMMANDS[row.command].click.params for word in param.opts}
    options = {word for word in known if word.startswith("--")}
    assert set(row.renamed.values()) | set(row.defaults) <= options
    assert {word for word in row.fixed if word.startswith("--")} <= options
    assert set(row.arguments.values()) == known - options


@pytest.mark.parametrize("name", sorted(one_shot.TABLE))
def test_every_row_has_help_with_its_own_names(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._one_shot([name, "--help"]) == 0
    page = capsys.readouterr().out
    row = one_shot.TABLE[name]
    assert page.startswith("Usage: mlxfun-shell ")
    for option in (*row.renamed, *row.arguments):
        assert option in page
