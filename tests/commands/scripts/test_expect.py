"""Assertions on reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands.scripts.expect import ExpectationFailed, check, find, parse_expectation
from mlxfun.errors import UsageError
from tests.commands.conftest import Bench

DATA = {
    "perplexity": {"all": 14.0, "eval_wiki.jsonl": 7.5, "a": {"b": 1}, "a.b": 2},
    "nodes": [{"state": "1e10"}, {"state": "22"}],
    "cancelled": False,
    "metric": None,
    "state": "1e10",
}


@pytest.mark.parametrize(
    "text",
    [
        "perplexity.all <= 14",
        "perplexity.all >= 14.0",
        "perplexity.all < 1.41e1",
        "perplexity.all>13",
        "perplexity.all == 14",
        "perplexity.all != 15",
        "perplexity.eval_wiki.jsonl == 7.5",
        "nodes.1.state == 22",
        "nodes.1.state == '22'",
        "state == 1e10",
        "cancelled == false",
        "metric == null",
        "ok",
    ],
)
def test_an_expectation_that_holds(text: str) -> None:
    check(parse_expectation(text), DATA, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity.all <= 13.9", "expect perplexity.all <= 13.9: found 14.0"),
        ("state == 10000000000", 'expect state == 10000000000: found "1e10"'),
        ("metric < 3", "expect metric < 3: found None, not a number"),
        ("cancelled < 3", "expect cancelled < 3: found False, not a number"),
        (
            "perplexty.all <= 13",
            "expect perplexty.all <= 13: the last report has no 'perplexty.all', it has "
            "cancelled, metric, nodes, perplexity, state",
        ),
        ("nodes.2.state == a", "expect nodes.2.state == a: the last report has no"),
        ("error", "expect error: the last command did not fail"),
    ],
)
def test_an_expectation_that_fails_says_what_was_found(text: str, message: str) -> None:
    with pytest.raises(ExpectationFailed) as caught:
        check(parse_expectation(text), DATA, None)
    assert str(caught.value).startswith(message)


def test_expectations_about_failures() -> None:
    check(parse_expectation('error "to undo"'), None, "nothing to undo")
    check(parse_expectation("error"), None, "nothing to undo")
    for text in ("ok", "state == a"):
        with pytest.raises(ExpectationFailed, match="the last command failed: nothing to undo"):
            check(parse_expectation(text), None, "nothing to undo")
    with pytest.raises(ExpectationFailed, match="no command has run yet"):
        check(parse_expectation("ok"), None, None)


@pytest.mark.parametrize("text", ["perplexity.all", "a = 3", "<= 3", "a <= b", "okay"])
def test_what_cannot_be_checked_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_expectation(text)


def test_the_longest_key_wins() -> None:
    assert find(DATA, "perplexity.a.b") == 2
    assert find({"a": {"b": 1}}, "a.b") == 1


def test_expect_looks_at_the_last_report_and_at_the_state(bench: Bench) -> None:
    (ended,) = bench.do("collect --dataset demo:mixed --max-samples 3")
    bench.do("expect samples == 3", "expect samples >= 3", "expect kind == collect")
    bench.do(f"expect state == {ended.state}", "set seed 3", "expect samples == 3")
    assert bench.run("expect samples == 4").error == "expect samples == 4: found 3"
    bench.run("undo")
    bench.do("expect error nothing to undo")


def test_a_malformed_expectation_is_refused_before_its_script_runs(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "s.mlxfun").write_text("collect --dataset demo:mixed\nexpect perplexity.all 14\n")
    ended = bench.run(f"replay {tmp_path}/s.mlxfun")
    assert ended.usage
    assert ended.error == (
        f"{tmp_path}/s.mlxfun:2: expect: 'perplexity.all 14' is not an expectation: write PATH "
        "OPERATOR VALUE (operators <= >= == != < >), ok, or error TEXT"
    )
    assert bench.sessions[0].samples == 0
