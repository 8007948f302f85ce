"""Scan, prune within the report, steer by it, combine statistics: typed, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import COLLECT, Shell
from tui.state import mixer_channels

SCAN = (
    "domain-scan --domain demo:python --general demo:medical --domain-name python "
    "--output domain_report.json --max-tokens 32"
)


@pytest.fixture(autouse=True)
def leaves_the_statistics_that_it_found(shell: Shell) -> Iterator[None]:
    yield
    shell.reset()
    shell.do("stats reset", COLLECT)


def test_from_a_scan_to_a_prune_and_steering_and_back(shell: Shell) -> None:
    found = shell.do(SCAN).report.data()
    assert found["more"]
    shell.do("collect --dataset demo:mixed --max-samples 8 --max-tokens 32")
    plan = shell.do("prune --n-prune 4 --domain-map domain_report.json").report.data()
    for layer, experts in found["more"].items():
        assert not set(experts) & set(plan["pruned"][layer])
    shell.do("discard")
    before = shell.do("info").state
    steered = shell.do("steer --domain-map domain_report.json --max-experts 3").report.data()
    assert sum(map(len, steered["activated"].values())) == 3
    assert steered["deactivated"] == {}
    measured = shell.do("evaluate --dataset demo:eval --max-samples 3 --max-tokens 32").report
    assert measured.data()["steered"]
    suppressed = shell.do(
        "steer --clear --domain-map domain_report.json --domain-mode suppress --rule additive "
        "--mask-value -2"
    )
    assert suppressed.report.data()["activated"] == {}
    assert suppressed.report.data()["rule"] == "additive"
    assert shell.do("steer --clear").state == before, "steering is no edit"


def test_a_report_of_before_a_prune_needs_allow_stale_afterwards(shell: Shell) -> None:
    shell.do(SCAN)
    shell.do("collect --dataset demo:mixed --max-samples 4 --max-tokens 32")
    shell.do("prune --n-prune 2 --domain-map domain_report.json")
    shell.do("apply")
    error = shell.refused("steer --domain-map domain_report.json")
    assert "domain_report.json was made on state" in error
    assert "--allow-stale" in error
    shell.do("steer --domain-map domain_report.json --allow-stale")
    shell.do("steer --clear")


def test_two_reports_in_the_mixer_steer_what_was_picked_by_hand(shell: Shell) -> None:
    channels: mixer_channels.Channels = ()
    for name in ("python", "solidity"):
        found = shell.do(SCAN.replace("python", name).replace("domain_report", name)).report
        channels = mixer_channels.with_report(channels, found)
    channels = mixer_channels.faded(
        mixer_channels.turned(mixer_channels.faded(channels, 0, 1), 1), 1, -1
    )
    channels, _ = mixer_channels.added(channels, 3, 7)
    line = mixer_channels.line(channels)
    report = shell.do(line).report
    one, two = report.maps
    assert (one.mode, two.mode, two.most) == ("boost", "suppress", len(two.names) - 1)
    assert [c.on for c in mixer_channels.synced(channels, report)] == [True] * 3
    named = {cell for use in report.maps for cell in use.names}
    steered = report.data()
    # By hand: the later report's strongest out, the earlier one's in where they are not out.
    out = set(two.cells)
    assert named >= out
    into = {cell for cell in one.cells if cell not in out}
    words = {way: ",".join(f"{ly}:{e}" for ly, e in sorted(cells))
             for way, cells in (("activate", into), ("deactivate", out))}  # fmt: skip
    by_hand = shell.do(
        f"steer --clear --activate {words['activate']} --deactivate {words['deactivate']} "
        "--level 3:7=0.5"
    ).report.data()
    for part in ("activated", "deactivated", "levels", "rule"):
        assert steered[part] == by_hand[part]
    assert by_hand["maps"] == []


def test_statistics_of_two_texts_are_merged_and_prune_by_rank(shell: Shell) -> None:
    for name in ("python", "medical"):
        shell.do(f"collect --dataset demo:{name} --max-samples 4 --max-tokens 32")
        shell.do(f"stats save {name}.npz")
    shell.do("stats merge python.npz medical.npz --output both.npz --by rank")
    shell.do("stats merge python.npz medical.npz --output sum.npz")
    shell.do("stats subtract sum.npz medical.npz --output left.npz")
    same = shell.do("stats diff left.npz python.npz --output same.json").report.data()
    assert same["rank_correlation"]["freq"] > 0.999
    with open("same.json") as file:
        assert json.load(file)["num_experts"] == 16
    shell.do("stats load both.npz")
    assert shell.do("prune --n-prune 4 --metric reap").report.data()["experts_after"] == 12
    assert "no part of" in shell.refused("stats subtract medical.npz python.npz --output x.npz")


def test_a_broken_configuration_is_refused_and_nothing_is_steered(shell: Shell) -> None:
    with open("steer.json", "w") as file:
        json.dump({"activate": {"0": [1]}, "boost": 3}, file)
    assert "unknown keys 'boost'" in shell.refused("steer --config steer.json")
    with open("steer.json", "w") as file:
        json.dump({"activate": {"0": [1]}, "deactivate": {"5": [2, 3]}}, file)
    steered = shell.do("steer --config steer.json").report.data()
    assert steered["activated"] == {"0": [1]}
    assert steered["deactivated"] == {"5": [2, 3]}
