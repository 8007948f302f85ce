"""The main job on the bundled model: real weights, real processes, and what stock mlx-lm makes of it.

The session is the one that the README's promise is measured by, with a shorter preview; the whole
of it, word for word, is in tests/slow.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Program, typed

SESSION = (
    "collect --dataset demo:mixed --max-samples 32 --max-tokens 64",
    "prune --n-prune 4 --metric reap_sum",
    "preview --dataset demo:eval --max-samples 6",
    "apply",
    "undo",
    "redo",
    "save out",
    "evaluate --dataset demo:eval --max-samples 6",
    "info",
    "history",
)
KEYS = {
    "info": {"model_type", "moe_layers", "experts", "top_k", "parameters", "bytes", "dtype"},
    "collect": {"samples", "tokens", "tokens_per_second", "coverage"},
    "prune": {"kept", "bytes_before", "bytes_after"},
    "preview": {"perplexity", "tokens", "kl_mean", "kl_p99", "top1_agreement"},
    "evaluate": {"perplexity", "tokens", "kl_mean", "kl_p99", "top1_agreement"},
    "save": {"path", "bytes", "gate"},
    "history": {"nodes", "current"},
}
STOCK = """
import sys, mlx.core as mx
from mlx_lm import load, generate
model, tokenizer = load(sys.argv[1])
model.set_dtype(mx.float32)  # MLX's CPU backend has no gather_mm in 16 bits
text = generate(model, tokenizer, prompt="Solidity is", max_tokens=8)
print(model.args.num_experts, len(text) > 0)
"""

Lines = list[dict[str, Any]]


def headless(program: Program, *arguments: str) -> tuple[Lines, str]:
    """JSON lines and stderr of a run that must end well, the exit of the process included."""
    done = program.run("--headless", "--json", *arguments)
    # 134 would be MLX's streams, torn down while the process exits.
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def recorded(directory: Path) -> tuple[Lines, str]:
    start = ("--demo", "--seed", "1", "--record", "s.mlxfun")
    return headless(Program(directory), *start, *typed(SESSION))


def test_every_line_has_the_documented_keys(recorded: tuple[Lines, str]) -> None:
    lines = recorded[0]
    assert [o["command"] for o in lines] == ["load demo", *SESSION]
    for found in lines:
        assert set(found) == {"command", "ok", "state", "seconds", "report", "data"}
        name = found["command"].split()[0]
        assert KEYS.get(name, set()) <= set(found["data"])
        if name in ("preview", "evaluate"):
            assert set(found["data"]["perplexity"]) == {"demo:eval", "all"}


def test_progress_is_on_stderr_and_never_on_stdout(recorded: tuple[Lines, str]) -> None:
    assert "calibrating: 4 of 32 samples" in recorded[1]


def test_the_main_job_changes_the_state_and_comes_back_to_it(
    directory: Path, recorded: tuple[Lines, str]
) -> None:
    loaded, collected, pruned, previewed, applied, undone, redone, saved, *_ = recorded[0]
    assert loaded["state"] == collected["state"] == previewed["state"] == undone["state"]
    assert applied["state"] == redone["state"] == pruned["data"]["state_after"] != loaded["state"]
    assert loaded["data"]["experts"] == 16
    assert [len(kept) for kept in pruned["data"]["kept"].values()] == [12] * 6
    assert pruned["data"]["bytes_after"] < pruned["data"]["bytes_before"]
    assert saved["data"]["gate"]["load"] == "ok"
    assert "identical" in saved["data"]["gate"]["tensors"]
    assert (directory / "out" / "model.safetensors").stat().st_size <= saved["data"]["bytes"]


def test_evaluate_after_apply_repeats_the_preview_bit_for_bit(
    recorded: tuple[Lines, str],
) -> None:
    by_name = {o["command"].split()[0]: o["data"] for o in recorded[0]}
    previewed, evaluated = by_name["preview"], by_name["evaluate"]
    for key in ("perplexity", "interval", "baseline", "kl_mean", "kl_p99", "top1_agreement"):
        assert previewed[key] == evaluated[key]
    assert previewed["kl_mean"] > 0
    assert previewed["perplexity"]["all"] > previewed["baseline"]["all"]
    assert by_name["info"]["experts_kept"] == 12
    assert [n["command"] for n in by_name["history"]["nodes"]] == [
        "load demo",
        "prune --n-prune 4 --metric reap_sum",
    ]


def test_a_replay_of_it_reproduces_every_state_the_figures_and_the_files(
    directory: Path, recorded: tuple[Lines, str]
) -> None:
    first = recorded[0]
    second, said = headless(Program(directory), "--replay", "s.mlxfun")
    assert [(o["command"], o["state"]) for o in second[:-1]] == [
        (o["command"], o["state"]) for o in first
    ]
    assert second[-1]["data"]["compared"] == len(SESSION)
    output = Path(second[-1]["data"]["output_root"])
    assert f"what it saves goes below {output}" in said
    weights = [root / "out" / "model.safetensors" for root in (directory, output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert second[3]["data"]["perplexity"] == first[3]["data"]["perplexity"]


def test_a_replay_stops_at_the_first_state_that_differs(
    directory: Path, recorded: tuple[Lines, str]
) -> None:
    lines = (directory / "s.mlxfun").read_text().splitlines()
    applied = lines.index("apply") + 1
    assert lines[applied] == f"#= state {recorded[0][4]['state']}"
    lines[applied] = "#= state 000000000000"
    (directory / "other.mlxfun").write_text("\n".join(lines[: applied + 3]) + "\n")
    done = Program(directory).run("--headless", "--json", "--replay", "other.mlxfun")
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [o["command"] for o in found[-2:]] == ["apply", "replay other.mlxfun"]
    assert f"other.mlxfun:{lines.index('apply') + 1}" in found[-1]["error"]
    assert "000000000000" in found[-1]["error"]


def test_stock_mlx_lm_opens_what_was_saved_in_a_process_of_its_own(
    directory: Path, recorded: tuple[Lines, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(directory / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "True"]


def test_what_was_saved_can_be_loaded_and_pruned_again(
    directory: Path, recorded: tuple[Lines, str]
) -> None:
    lines = (
        "info",
        "collect --dataset demo:python --max-samples 4 --max-tokens 32",
        "prune --n-prune 2",
        "apply",
        f"save {shlex.quote('again and again')}",
    )
    found, _ = headless(Program(directory), "out", *typed(lines))
    assert found[1]["data"]["experts"] == 12
    assert [len(kept) for kept in found[3]["data"]["kept"].values()] == [10] * 6
    config = json.loads((directory / "again and again" / "config.json").read_text())
    assert config["num_experts"] == 10
