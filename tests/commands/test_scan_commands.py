"""The scan commands on a stub session: what is asked for, where it is written, what is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from commands.render import render
from mlxfun.comparison_reports import ScanReport, ScanRow
from mlxfun.options import DatasetOptions, ScanOptions, SteerOptions
from mlxfun.reports import (
    SteerReport,
)
from tests.commands.conftest import Bench


def asked(bench: Bench, line: str) -> ScanOptions:
    """The options that reach the session."""
    seen: list[ScanOptions] = []
    session = bench.sessions[0]
    original = session._scan

    def spy(technique: str, options: ScanOptions) -> ScanReport:
        seen.append(options)
        return original(technique, options)

    session._scan = spy  # type: ignore[method-assign]
    bench.do(line)
    return seen[0]


def test_a_safety_scan_asks_for_both_sets_with_the_same_limits(bench: Bench) -> None:
    line = (
        "safety-scan --harmful demo:harmful --benign demo:harmless --output s.json "
        "--threshold-percentile 95 --max-samples 12 --max-tokens 64 --seed 3"
    )
    limits = {"max_samples": 12, "max_tokens": 64, "seed": 3}
    assert asked(bench, line) == ScanOptions(
        DatasetOptions("demo:harmful", **limits),
        DatasetOptions("demo:harmless", **limits),
        Path("s.json"),
        threshold_percentile=95.0,
    )


def test_a_domain_scan_carries_the_name(bench: Bench) -> None:
    line = "domain-scan --domain demo:solidity --general demo:mixed --domain-name sol --output d"
    options = asked(bench, line)
    assert options.domain_name == "sol"
    assert (options.threshold_percentile, options.alpha) == (90.0, 0.01)


def test_what_is_missing_or_impossible_is_named_before_anything_runs(bench: Bench) -> None:
    line = "safety-scan --harmful demo:harmful --output s.json"
    assert "--benign" in str(bench.run(line).error)
    line += " --benign demo:harmless --threshold-percentile 30"
    assert "30.0 is not in the range" in str(bench.run(line).error)
    assert "--domain-name" in str(bench.run("domain-scan --domain a --general b --output c").error)


def shown(report: ScanReport) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_a_scan_is_shown_as_a_table_of_the_strongest(bench: Bench) -> None:
    line = "safety-scan --harmful demo:harmful --benign demo:harmless --output s.json"
    report = bench.do(line)[0].report
    assert isinstance(report, ScanReport)
    text = shown(report)
    assert "safety scan: 1 experts work more on harmful, 0 more on benign text, of 24" in text
    assert "composite  frequency     gate" in text
    assert "3:5" in text
    assert "+0.250" in text
    assert "note: few" in text
    assert "risk difference" not in text


def test_a_long_table_ends_with_how_many_are_left_in_the_file(bench: Bench) -> None:
    line = "safety-scan --harmful demo:harmful --benign demo:harmless --output s.json"
    report = bench.do(line)[0].report
    assert isinstance(report, ScanReport)
    rows = tuple(ScanRow(3, e, 1.0, 0.2, 0.1, 0.001, 1.0, 0.125) for e in range(23))
    text = shown(replace(report, rows=rows))
    assert "and 3 more in the file" in text
    assert "risk difference" in text
    assert "+0.125" in text


def test_steering_from_files_reaches_the_session_whole(bench: Bench) -> None:
    seen: list[SteerOptions] = []
    session = bench.sessions[0]
    original = session.steer

    def spy(options: SteerOptions) -> SteerReport:
        seen.append(options)
        return original(options)

    session.steer = spy  # type: ignore[method-assign]
    bench.do(
        "steer --safety-map s.json --safety-mode unsafe --domain-map d.json --domain-mode suppress "
        "--config c.json --max-experts 5 --rule additive --boost-value 1.5 --mask-value -3 "
        "--allow-stale --deactivate 3:1"
    )
    assert seen == [
        SteerOptions(
            deactivate={3: (1,)},
            safety_map=Path("s.json"),
            safety_mode="unsafe",
            domain_map=Path("d.json"),
            domain_mode="suppress",
            config=Path("c.json"),
            max_experts=5,
            rule="additive",
            boost_value=1.5,
            mask_value=-3.0,
            allow_stale=True,
        )
    ]
    assert "--safety-map" in str(bench.run("steer").error)
    assert "0.0 is not in the range x>0" in str(bench.run("steer --boost-value 0").error)


def test_additive_steering_is_shown_with_what_it_adds() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(SteerReport({3: (1,)}, {}, (), "additive", 1.5, -10000.0)))
    assert "adding +1.5 and -10000" in capture.get()
    assert "+1.5 activated, -10000 deactivated" in capture.get()
