"""The rest of mlx_fun's command reference: options that its guide's walk does not use, and what of it
is not offered here."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from mlx_lm.utils import load as stock_load

from commands import cli, one_shot
from mlxfun.data import demo

WALK = """
mlx-fun collect --model demo --dataset {mixed} --output ./s.npz --max-samples 6 --max-tokens 48 \
    --text-key content --seed 42
mlx-fun safety-scan --model demo --harmful-dataset {harmful} --benign-dataset {harmless} \
    --output safety.json --max-samples 48 --max-tokens 64 --threshold-percentile 80.0
mlx-fun domain-scan --model demo --domain-dataset {solidity} --general-dataset {medical} \
    --output domain.json --domain-name solidity --max-samples 12 --max-tokens 64
mlx-fun prune --model demo --saliency s.npz --output ./target --n-prune 4 \
    --safety-map safety.json --safety-mode target
mlx-fun prune --model demo --saliency s.npz --output ./both --n-prune 4 --metric ean \
    --safety-map safety.json --safety-mode protect --domain-map domain.json --domain-mode protect
mlx-fun prune --model demo --saliency s.npz --output ./wide --n-prune 4 --model-wide \
    --min-experts-per-layer 1 --ignore-experts "1,2,14..15"
mlx-fun prune --model demo --expert-list experts.json --output ./list
mlx-fun prune --model demo --saliency s.npz --output ./stream --n-prune 4 --stream
mlx-fun merge --model demo --saliency s.npz --dataset {mixed} --output ./merged \
    --expert-list experts.json --max-samples 4 --max-tokens 32
mlx-fun steer --model demo --safety-map safety.json --mode unsafe --prompt "Hello" --max-tokens 4 \
    --mask-value -1e9 --boost-value 1e4
mlx-fun abliterate --model demo --harmful-dataset {harmful} --benign-dataset {harmless} \
    --output ./abliterated --layers 1-3 --target safety-experts --safety-map safety.json \
    --max-samples 8 --max-tokens 64 --extraction-position mean --text-key content
mlx-fun stats-purge --input s.npz --output purged.npz --max-norm 5
mlx-fun convert-nvfp4 --model demo --output ./fp4
mlx-fun convert-nvfp4 --hf-path ./fp4 --mlx-path ./again
""".replace("\\\n", " ").strip()


def run(line: str) -> int:
    """The exit code of the program for a line, its name left out."""
    start = cli._one_shot(shlex.split(line)[1:])
    assert isinstance(start, cli.Start), line
    return cli.run(start)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every line of WALK ended well."""
    folder = tmp_path_factory.mktemp("walk")
    sets = {name: str(demo.dataset_path(name)) for name in demo.DATASETS}
    keep = {str(layer): list(range(layer, layer + 10)) for layer in range(6)}
    (folder / "experts.json").write_text(json.dumps({"version": "1.0", "keep_map": keep}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in WALK.format(**sets).splitlines():
            assert run(line) == 0, line
    return folder


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def test_every_line_ends_well_and_saves_what_it_says(walked: Path) -> None:
    counts = {name: config(walked / name)["num_experts"] for name in
              ("target", "both", "wide", "list", "stream", "merged", "abliterated", "fp4")}  # fmt: skip
    assert counts == {"target": 12, "both": 12, "wide": 12, "list": 10, "stream": 12,
                      "merged": 10, "abliterated": 16, "fp4": 16}  # fmt: skip
    assert json.loads((walked / "both" / "reap_metadata.json").read_text())["metric"] == "man"
    wide = json.loads((walked / "wide" / "reap_metadata.json").read_text())["keep_map"]
    assert len({tuple(kept) for kept in wide.values()}) == 1
    assert {1, 2, 14, 15} <= set(next(iter(wide.values())))


def test_ean_prunes_by_the_mean_of_the_norms_that_mlx_fun_prunes_by(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(f"x prune --model demo --saliency {walked}/s.npz --output out --n-prune 4 --metric ean") == 0  # fmt: skip
    stats = np.load(walked / "s.npz")
    freq = stats["freq"]
    mean = np.divide(stats["ean_sum"], freq, out=np.zeros_like(freq), where=freq > 0)
    kept = json.loads((tmp_path / "out" / "reap_metadata.json").read_text())["keep_map"]
    for row, experts in zip(mean, kept.values(), strict=True):
        assert sorted(experts) == sorted(np.argsort(row, kind="stable")[4:].tolist())


def test_a_model_packed_as_nvfp4_opens_in_stock_mlx_lm(walked: Path) -> None:
    for name in ("fp4", "again"):
        quantization = config(walked / name)["quantization"]
        assert isinstance(quantization, dict)
        assert {k: quantization[k] for k in ("mode", "bits", "group_size")} == {
            "mode": "nvfp4", "bits": 4, "group_size": 16,
        }  # fmt: skip
        model, _ = stock_load(str(walked / name))
        assert model.layers[0].mlp.switch_mlp.gate_proj.mode == "nvfp4"
    one, two = ((walked / name).glob("*.safetensors") for name in ("fp4", "again"))
    assert [f.read_bytes() for f in sorted(one)] == [f.read_bytes() for f in sorted(two)]


DATA = {"--max-tokens": "2048", "--text-key": "content", "--seed": None}
FLAGS = {
    "collect": {"--dataset": None, "--output": None, "--max-samples": "128", **DATA},
    "prune": {
        "--saliency": None, "--output": None, "--n-prune": None, "--metric": "reap",
        "--strategy": "bottom", "--safety-map": None, "--safety-mode": None, "--domain-map": None,
        "--domain-mode": None,
    },
    "merge": {
        "--saliency": None, "--dataset": None, "--output": None, "--n-prune": None,
        "--metric": "reap", "--similarity-mode": "gated", "--alignment": "greedy",
        "--max-group-size": "16", "--max-samples": "64", "--max-tokens": "2048",
        "--max-similarity-tokens": "512", "--max-alignment-tokens": "256", "--seed": None,
    },
    "smoke-test": {"--prompt": "pragma solidity ^0.8.0;", "--max-tokens": "100"},
    "safety-scan": {
        "--harmful-dataset": None, "--benign-dataset": None, "--output": None,
        "--max-samples": "128", **DATA, "--threshold-percentile": "90",
    },
    "domain-scan": {
        "--domain-dataset": None, "--general-dataset": None, "--output": None,
        "--domain-name": None, "--max-samples": "128", **DATA, "--threshold-percentile": "90",
    },
    "steer": {
        "--safety-map": None, "--mode": None, "--prompt": None, "--max-tokens": "100",
        "--mask-value": "-1e9", "--boost-value": "1e4",
    },
    "abliterate": {
        "--harmful-dataset": None, "--benign-dataset": None, "--output": None, "--layers": "auto",
        "--target": "all", "--safety-map": None, "--max-samples": "64", **DATA,
        "--extraction-position": "last",
    },
    "amplify": {"--domain-map": None, "--output": None, "--scale": "1.0", "--threshold": "0.0"},
}  # fmt: skip
"""The tables of flags in mlx_fun's README, with the defaults that it gives; None for none."""


TOLD_OTHERWISE = {
    "--strategy", "--similarity-mode", "--layers", "--target",  # by the text of their help
    "--mask-value", "--boost-value",  # the shell's rule steermoe puts experts in and out without them
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_the_readmes_tables_is_taken_with_its_default(name: str) -> None:
    row = one_shot.TABLE[name]
    built = {flag: param for param in one_shot._click(row, name).params for flag in param.opts}
    for flag, default in FLAGS[name].items():
        option = built[flag]
        if default is None or flag in TOLD_OTHERWISE:
            continue
        told = re.search(r"\(default: ([^)]*?)(; a search tries both)?\)", option.help or "")
        found = told[1] if told else option.default
        assert found in (default, default.removesuffix(".0")), (flag, default, found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x ui --server-url http://127.0.0.1:8080", "run `mlxfun-shell MODEL`"),
        ("x convert-nvfp4 --model demo --output o --mode dequant", "mlx_lm.convert --dequantize"),
        ("x smoke-test --model demo --kv-compress turbo", "no compressed KV caches"),
        ("x steer --model demo --kv-compress-bits=3 --prompt x", "no compressed KV caches"),
    ],
)
def test_what_is_not_offered_says_in_one_sentence_what_to_use(line: str, message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        run(line)
    said = caught.value.format_message()
    assert message in said
    assert "\n" not in said


def test_a_flag_that_does_nothing_here_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cli._one_shot(
        shlex.split("prune --model demo --saliency a.npz --output o --n-prune 1 --stream")
    )
    assert "note: --stream is about memory in mlx_fun" in capsys.readouterr().err


def test_counts_of_a_server_that_measured_no_norms_are_not_pruned_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    freq, none = np.arange(1.0, 97.0).reshape(6, 16), np.zeros((6, 16))
    np.savez("light.npz", freq=freq, weighted_freq_sum=freq / 2, reap_sum=none, reap_count=none,
             ean_sum=none, num_layers=6, num_experts=16)  # fmt: skip
    line = "x prune --model demo --saliency light.npz --n-prune 4 --allow-stale"
    assert run(f"{line} --output a --metric reap") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "every expert scores 0 by reap" in said
    assert "choose one of freq, weighted_freq" in said
    assert run(f"{line} --output b --metric freq") == 0


def test_every_name_that_is_not_offered_is_none_of_the_table() -> None:
    assert not one_shot.ELSEWHERE.keys() & one_shot.TABLE.keys()


def test_a_merge_by_norms_that_nobody_measured_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    freq, none = np.ones((6, 16)), np.zeros((6, 16))
    np.savez("light.npz", freq=freq, weighted_freq_sum=freq, reap_sum=none, ean_sum=none)
    line = "x merge --model demo --saliency light.npz --n-prune 4 --allow-stale --output o"
    assert run(f"{line} --dataset demo:mixed --max-samples 4 --max-tokens 16") == 1
    assert "every expert scores 0 by reap" in " ".join(capsys.readouterr().err.split())
