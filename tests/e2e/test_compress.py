"""compress: the best way to a size or within a loss is staged, and the rest is as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from commands.scripts.compressions import variants
from mlxfun.errors import UsageError
from mlxfun.session.measuring.variants import RecipeReport, Target
from tests.e2e.conftest import Shell

COLLECT = "collect --dataset demo:mixed --max-samples 6 --max-tokens 32"


def compressed(shell: Shell, line: str) -> RecipeReport:
    report = shell.do(line).report
    assert isinstance(report, RecipeReport)
    return report


def test_the_least_loss_within_a_size_is_staged_and_not_applied(shell: Shell) -> None:
    shell.do("goto 0", COLLECT)
    report = compressed(shell, "compress --to-bytes 5.4MB --output sizes")
    found = report.variants
    starts = [v.line.split()[0] for v in found]
    assert starts == ["narrow", "prune", "prune", "prune", "bits", "narrow", "prune"]
    assert all(v.bytes <= 5.4e6 and not v.error for v in found)
    assert found[report.kept].kl == min(v.kl for v in found)
    # Most values of 16 bits have bits to spare: at this size packing some loses least.
    assert "bits --to-bytes" in found[report.kept].line
    edits = found[report.kept].line.count(" then ")
    assert (shell.engine.view().plan is not None) == bool(edits)
    document = json.loads(Path("sizes/report.json").read_text())
    assert document["kept"] == report.kept
    assert Path("sizes/loss.svg").read_text().startswith("<?xml")
    plan = f"sizes/bits-{found[report.kept].line[-6]}.json"
    shell.do(*(["apply"] if edits else []), f"save packed --quantize {plan}", "goto 0")
    size = sum(file.stat().st_size for file in Path("packed").glob("*.safetensors"))
    assert size <= 5.4e6 + 100_000, "and what the file says of its tensors"


@pytest.mark.slow
def test_the_smallest_model_within_a_loss_is_staged(shell: Shell) -> None:
    shell.do("goto 0", COLLECT)
    report = compressed(shell, "compress --max-kl 1.5 --output losses")
    within = [v for v in report.variants if not v.error and v.kl <= 1.5]
    assert len(within) < len(report.variants), "some lose more than that"
    assert report.variants[report.kept].bytes == min(v.bytes for v in within)
    # Four bits cost less than that: a plan of bits is named, with the edits ahead of it staged.
    assert "bits --to-bytes" in report.variants[report.kept].line
    shell.do(*(["discard"] if shell.engine.view().plan else []), "goto 0")


@pytest.mark.slow
def test_nothing_is_staged_where_nothing_fits(shell: Shell) -> None:
    shell.do("goto 0", COLLECT)
    assert "none of the" in (shell.run("compress --max-kl 0.000001 --output none").error or "")
    assert shell.engine.view().plan is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compress", "one of --to-bytes SIZE and --max-kl X"),
        ("compress --to-bytes 5MB --max-kl 1", "one of --to-bytes SIZE and --max-kl X"),
        ("compress --to-bytes 0", "'0' leaves no room for a model"),
        ("narrow --to-bytes 0MB", "'0MB' leaves no room for a model"),
        (
            "compress --to-bytes 1KB",
            "compress can make about 793.4 KiB of this model at the smallest",
        ),
        (
            "compress --to-bytes 1KB --no-bits",
            "about 1.6 MiB of this model at the smallest; ask for more",
        ),
        ("compress --to-bytes 900MB", "the model takes 6.1 MiB as saved already"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(shell: Shell, line: str, message: str) -> None:
    shell.do("goto 0", COLLECT)
    assert message in (shell.run(line).error or "")


def test_without_statistics_no_variant_is_tried() -> None:
    shell = Shell()  # the others are left their statistics
    shell.do("load demo")
    assert shell.run("compress --to-bytes 5MB").error == "no statistics yet: run collect first"
    assert not Path("compress-report").exists()
    shell.engine.close()


def test_each_variant_takes_as_much_as_the_size_asks_for(shell: Shell) -> None:
    model = shell.engine.view().model
    assert model is not None
    model = replace(
        model, checkpoint_bytes=1000, expert_bytes=(5, 5), experts_kept=16, top_k=2, groups=1,
        quantization=None,
    )  # fmt: skip
    lines = [" then ".join(v) for v in variants(model, Target("bytes", 930))]
    assert [line.split()[:3] for line in lines] == [
        ["narrow", "--to-bytes", "930"],
        ["prune", "--n-prune", "7"],
        ["prune", "--n-prune", "2"],
        ["prune", "--n-prune", "4"],
        ["bits", "--to-bytes", "930"],
        ["narrow", "--fraction", "0.25"],
        ["prune", "--n-prune", "2"],
    ]
    assert lines[5].endswith("then bits --to-bytes 930 --output /bits-2.json")
    assert lines[2].endswith("then narrow --to-bytes 930")
    # Groups lose the same number each, and packed experts are packed anew.
    grouped = replace(model, groups=4, quantization="4-bit affine")
    lines = [" then ".join(v) for v in variants(grouped, Target("bytes", 930))]
    assert [line.split()[2] for line in lines[1:]] == ["8", "4"], "and what is packed stays packed"
    assert lines[0] == "narrow --to-bytes 930 --requantize"
    # More than the experts' number can give: they have to become narrower.
    tight = [" then ".join(v) for v in variants(model, Target("bytes", 855))]
    # 840 bytes are beside the experts, which can become next to none: below that there is nothing.
    assert variants(model, Target("bytes", 840), bits=False)
    with pytest.raises(UsageError, match="about 840 B of this model at the smallest"):
        variants(model, Target("bytes", 839), bits=False)
    assert len(tight) == 5
    assert "narrow --to-bytes 855" in tight[1]
    plain = [" then ".join(v) for v in variants(model, Target("bytes", 930), bits=False)]
    assert len(plain) == 4
    assert not any("bits" in line for line in plain)
    with pytest.raises(UsageError, match="already"):
        variants(model, Target("bytes", 1000))
