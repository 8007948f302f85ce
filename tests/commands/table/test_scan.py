"""The scan commands on a stub session: what is asked for, where it is written, what is shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from commands import registry
from commands.completion import complete
from commands.output.render.dispatch import render
from commands.workbench.session_file import read_script
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions, PrepareOptions
from mlxfun.data.reports import PrepareReport
from mlxfun.errors import UsageError
from mlxfun.scans.options import ScanOptions
from mlxfun.scans.reports import ScanReport, ScanRow
from mlxfun.session.reports import SessionView
from mlxfun.steering.options import MapInForce, ScanMap, SteerOptions
from mlxfun.steering.reports import SteerReport
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
    line = (
        "domain-scan --domain demo:solidity --general demo:mixed --domain-name sol --output d.json"
    )
    options = asked(bench, line)
    assert options.domain_name == "sol"
    assert (options.threshold_percentile, options.alpha) == (90.0, 0.01)


def test_what_is_missing_or_impossible_is_named_before_anything_runs(bench: Bench) -> None:
    line = "safety-scan --harmful demo:harmful --output s.json"
    assert "--benign" in str(bench.run(line).error)
    line += " --benign demo:harmless --threshold-percentile 30"
    assert "30.0 is not in the range" in str(bench.run(line).error)
    assert "--domain-name" in str(
        bench.run("domain-scan --domain a --general b --output c.json").error
    )


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
    assert "safety scan: 1 expert works more on harmful, 0 more on benign text, of 24" in text
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
            maps=(
                ScanMap(Path("s.json"), "safety", "unsafe", 5),
                ScanMap(Path("d.json"), "domain", "suppress", 5),
            ),
            config=Path("c.json"),
            rule="additive",
            boost_value=1.5,
            mask_value=-3.0,
            allow_stale=True,
        )
    ]
    assert "--safety-map" in str(bench.run("steer").error)
    assert "0.0 is not in the range x>0" in str(bench.run("steer --boost-value 0").error)


A, B, S = ((Path(f"{name}.json"), kind) for name, kind in (
    ("a", "domain"), ("b", "domain"), ("s", "safety"),
))  # fmt: skip


@pytest.mark.parametrize(
    ("words", "maps"),
    [
        ("--domain-mode suppress --domain-map a.json", [(*A, "suppress", None)]),
        (
            # Given once: for all, as where there is one of each kind.
            "--safety-map s.json --max-experts 3 --domain-map a.json --domain-map b.json "
            "--domain-mode suppress",
            [(*S, "safe", 3), (*A, "suppress", 3), (*B, "suppress", 3)],
        ),
        (
            # Given more than once: for the map before it.
            "--domain-map a.json --domain-mode boost --max-experts 3 --safety-map s.json "
            "--domain-map b.json --domain-mode suppress --max-experts all",
            [(*A, "boost", 3), (*S, "safe", None), (*B, "suppress", None)],
        ),
        (
            "--domain-map b.json --max-experts 2 --domain-map=a.json --max-experts=4",
            [(*B, "boost", 2), (*A, "boost", 4)],
        ),
        (
            "--domain-map a.json --domain-mode boost --domain-mode suppress",
            [(*A, "suppress", None)],
        ),
        ("--safety-mode unsafe --domain-map a.json", [(*A, "boost", None)]),
        ("--activate 3:7", []),
    ],
)
def test_each_map_of_a_line_has_its_mode_and_its_limit(words: str, maps: list) -> None:
    assert registry.parse(f"steer {words}").params["maps"] == tuple(ScanMap(*m) for m in maps)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--domain-mode boost --domain-map a.json --domain-map b.json --domain-mode suppress",
            "--domain-mode boost stands before the first --domain-map: given more than once, each "
            "counts for the map before it",
        ),
        (
            "--max-experts 2 --domain-map a.json --safety-map s.json --max-experts 3",
            "--max-experts 2 stands before the first --safety-map or --domain-map",
        ),
        ("--max-experts 3", "--max-experts limits a map: give --safety-map or --domain-map"),
        ("--domain-map a.json --max-experts 0", "'0' is neither a number of experts, from 1 on"),
        ("--domain-map a.json --max-experts few", "'few' is neither a number"),
        ("--domain-map a.json --domain-mode up", "'up' is not one of 'boost', 'suppress'"),
    ],
)
def test_a_line_whose_maps_make_no_sense_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        registry.parse(f"steer {words}")


def test_after_a_map_another_map_and_its_mode_are_completed() -> None:
    def offered(line: str) -> list[str]:
        return [found.text for found in complete(line, SessionView())]

    line = "steer --domain-map a.json --domain-mode boost --domain-map b.json "
    assert offered(line + "--dom") == ["--domain-map", "--domain-mode"]
    assert offered(line + "--domain-mode s") == ["suppress", "suppress-general"]
    assert offered(line + "--max-experts a") == ["all"]


def test_maps_are_recorded_and_replayed_in_their_order(bench: Bench, tmp_path: Path) -> None:
    line = (
        "steer --clear --domain-map 'my a.json' --domain-mode boost --max-experts 3 "
        "--domain-map b.json --domain-mode suppress --max-experts all"
    )
    path = tmp_path / "s.mlxfun"
    bench.do(f"record {path}", line, "record --stop")
    (entry,) = [e for e in read_script(path).entries if e.line.startswith("steer")]
    assert entry.line == line
    assert [use.path.name for use in bench.sessions[0].steered.maps] == ["my a.json", "b.json"]
    bench.sessions[0].steered = None
    bench.do(f"replay {path}")
    assert bench.sessions[-1].steered.maps == (
        ScanMap(Path("my a.json"), "domain", "boost", 3),
        ScanMap(Path("b.json"), "domain", "suppress", None),
    )


def test_additive_steering_is_shown_with_what_it_adds() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(SteerReport({3: (1,)}, {}, (), "additive", 1.5, -10000.0)))
    assert "adding +1.5 and -10000" in capture.get()
    assert "+1.5 where on, -10000 where off" in capture.get()


def test_steering_by_reports_is_shown_with_their_share() -> None:
    console = Console(width=120)
    use = MapInForce(
        "a[b].json", "domain", "suppress", 2, ((0, 1), (0, 2), (3, 4)), ((0, 1), (0, 2))
    )
    with console.capture() as capture:
        console.print(render(SteerReport({}, {0: (1, 2)}, maps=(use,))))
    words = " ".join(capture.get().split())
    assert "domain report a[b].json, suppress: 2 of its experts" in words


def test_a_hub_set_is_prepared_as_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrepareOptions] = []

    def prepare(options: PrepareOptions, ctx: Context) -> PrepareReport:
        seen.append(options)
        return PrepareReport(options.source, options.split, str(options.output), 9, 4)

    monkeypatch.setattr("mlxfun.data.hub.prepare", prepare)
    ended = bench.do(
        "prepare-dataset a/b --split test --where lang=en --where kind=x=y --min-chars 5 "
        "--max-samples 4 --output s.jsonl"
    )[0]
    assert ended.report is not None
    assert ended.report.summary() == "wrote 4 of 9 records of a/b to s.jsonl"
    assert seen == [
        PrepareOptions(
            "a/b", Path("s.jsonl"), "test", where=(("lang", "en"), ("kind", "x=y")),
            min_chars=5, max_samples=4,
        )
    ]  # fmt: skip
    assert "'lang' is not COLUMN=VALUE" in str(
        bench.run("prepare-dataset a/b --where lang --output s.jsonl").error
    )


def test_modes_of_mlx_fun_are_translated_and_recorded_by_our_names(bench: Bench) -> None:
    for kind, theirs, ours in (
        ("safety", "safe", "unsafe"),
        ("safety", "unsafe", "safe"),
        ("domain", "boost", "boost"),
        ("domain", "suppress", "suppress-general"),
    ):
        line = f"steer --{kind}-map a.json --{kind}-mode {theirs}"
        bench.do(f"{line} --ancestor-modes")
        assert bench.sessions[0].steered.maps == (ScanMap(Path("a.json"), kind, ours, None),)
        bench.do(line)
        assert bench.sessions[0].steered.maps == (ScanMap(Path("a.json"), kind, theirs, None),)
    bench.do("steer --safety-map a.json --ancestor-modes")
    assert bench.sessions[0].steered.maps[0].mode == "unsafe", "there the default is theirs too"
