"""The commands that compare and combine files of statistics: they need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from commands.output.render.dispatch import render
from mlxfun.calibration.routing_stats import SUMS, RoutingStats
from tests.commands.conftest import Bench

MakeBench = Callable[..., Bench]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two runs, and what one run over both texts would have counted."""
    names = []
    for seed in (1, 2):
        update = np.random.default_rng(seed).uniform(1, 9, (2, len(SUMS), 4))
        stats = RoutingStats.empty((1, 2), 4, model="m", state="s").plus(update, 3, 40)
        stats.save(tmp_path / f"{seed}.npz")
        names.append(str(tmp_path / f"{seed}.npz"))
    return names


def shown(bench: Bench, line: str) -> str:
    report = bench.do(line)[0].report
    assert report is not None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_any_number_of_files_are_merged_with_options_before_or_after_them(
    make_bench: MakeBench, files: list[str], tmp_path: Path
) -> None:
    bench, (a, b) = make_bench(), files
    out = tmp_path / "m.npz"
    text = shown(bench, f"stats merge {a} {b} --output {out}")
    assert "stats merge by sum: 6 samples, 80 tokens from 2 files" in text
    before = out.read_bytes()
    assert "by rank" in shown(bench, f"stats merge --by rank --output {out} {a} {b}")
    assert out.read_bytes() != before
    assert "note: the sums are ranks" in shown(
        bench, f"stats merge {a} {b} {a} --by rank --output {out}"
    )


def test_a_purge_undoes_a_merge(make_bench: MakeBench, files: list[str], tmp_path: Path) -> None:
    bench, (a, b) = make_bench(), files
    bench.do(f"stats merge {a} {b} --output {tmp_path / 'm.npz'}")
    bench.do(f"stats subtract {tmp_path / 'm.npz'} {b} --output {tmp_path / 'p.npz'}")
    text = shown(bench, f"stats diff {a} {tmp_path / 'p.npz'}")
    assert "rank correlation 1.000, 100% of the lowest quarter shared" in text


def test_a_difference_shows_every_metric_and_the_experts_that_moved(
    make_bench: MakeBench, files: list[str], tmp_path: Path
) -> None:
    text = shown(make_bench(), f"stats diff {files[0]} {files[1]} --output {tmp_path / 'd.json'}")
    for metric in ("freq", "weighted_freq", "reap", "ean", "reap_sum", "reap_sq", "man", "msan"):
        assert any(line.startswith(f"{metric} ") for line in text.splitlines())
    assert "share in A  share in B" in text
    assert (tmp_path / "d.json").is_file()


def test_mistakes_are_named(make_bench: MakeBench, files: list[str], tmp_path: Path) -> None:
    bench, (a, b) = make_bench(), files
    assert "two or more" in str(bench.run(f"stats merge {a} --output {tmp_path / 'x.npz'}").error)
    assert "--output" in str(bench.run(f"stats merge {a} {b}").error)
    assert "is no part of" in str(bench.run(f"stats subtract {a} {b} --output x.npz").error)
    assert "does not exist" in str(bench.run("stats diff none.npz other.npz").error)


def test_output_stays_below_the_root(
    make_bench: MakeBench, files: list[str], tmp_path: Path
) -> None:
    bench = make_bench(output_root=tmp_path / "root")
    ended = bench.run(f"stats merge {files[0]} {files[1]} --output {tmp_path / 'm.npz'}")
    assert "outside the output root" in str(ended.error)
