"""A form and a command line say the same, for every command."""

from __future__ import annotations

import pytest

from commands.forms.form import completions, filled_in, form_of
from commands.registry import COMMANDS, parse
from mlxfun.errors import UsageError
from mlxfun.session.reports import SessionView


def values(line: str) -> dict[str, str]:
    form = form_of(line)
    assert form is not None
    return {field.name: field.value for field in form.fields if field.value}


def problems(line: str) -> dict[str, str]:
    form = form_of(line)
    assert form is not None
    return {field.name: field.problem for field in form.fields if field.problem}


def test_every_command_without_free_text_has_a_form_with_all_its_parameters() -> None:
    for name, command in COMMANDS.items():
        form = form_of(name)
        if command.tail or not command.click.params:
            assert form is None, name
        elif name not in ("load", "plan"):  # alone they list models, and show the staged plan
            assert form is not None, name
            assert {f.name for f in form.fields} == {p.name for p in command.click.params}, name


def test_required_fields_come_first_and_are_missed_until_they_are_filled() -> None:
    form = form_of("domain-scan --alpha 0.05")
    assert form is not None
    needed = ["domain", "general", "domain_name", "output"]
    assert [f.name for f in form.fields[:4]] == needed
    assert problems("domain-scan") == dict.fromkeys(needed, "required")
    line = "domain-scan --domain demo:python --general demo:mixed --domain-name p --output o.json"
    assert problems(line) == {}
    assert form_of(line).complete  # type: ignore[union-attr]


def test_a_wrong_value_is_said_at_its_own_field() -> None:
    found = problems(["prune --n-prune 0 --metric reapp", "--output_error", "x"][0])
    assert set(found) == {"n_prune", "metric"}
    assert "0 is not in the range x>=1" in found["n_prune"]
    assert "reapp" in found["metric"]


def test_what_belongs_to_no_field_is_said_of_the_line() -> None:
    form = form_of("prune --bogus 3")
    assert form is not None
    assert form.problem == "no such option --bogus"
    form = form_of("steer --max-experts 3")
    assert form is not None
    assert "--max-experts limits a map" in form.problem


@pytest.mark.parametrize(
    ("line", "name", "text", "expected"),
    [
        ("prune", "n_prune", "4", "prune --n-prune 4"),
        ("prune --n-prune 4 --metric reap", "n_prune", "", "prune --metric reap"),
        ("prune --n-prune=4", "n_prune", "8", "prune --n-prune 8"),
        ("prune", "model_wide", "on", "prune --model-wide"),
        ("prune --model-wide", "model_wide", "", "prune"),
        ("save", "path", "my model", "save 'my model'"),
        ("save --quantize 4", "path", "-x", "save --quantize 4 -- -x"),
        ("stats diff", "b", "b.npz", "stats diff b.npz"),
        ("stats diff b.npz", "b", "c.npz", "stats diff b.npz c.npz"),
        ("collect", "dataset", "a.jsonl:2 'b c'", "collect --dataset a.jsonl:2 --dataset 'b c'"),
        ("trace hello", "at", "layers.0", "trace hello --at layers.0"),
    ],
)
def test_a_field_changes_its_own_part_of_the_line(
    line: str, name: str, text: str, expected: str
) -> None:
    assert filled_in(line, name, text) == expected


def test_options_whose_order_matters_keep_it() -> None:
    line = "steer --safety-map a.json --safety-mode safe --safety-map b.json --safety-mode unsafe"
    changed = filled_in(line, "safety_map", "a.json c.json")
    assert changed == line.replace("b.json", "c.json")
    assert [m.mode for m in parse(changed).params["maps"]] == ["safe", "unsafe"]


def test_a_line_read_into_fields_and_written_again_means_the_same() -> None:
    line = "merge --dataset 'a b.jsonl:2' --dataset demo:mixed --n-prune 2 --auto --to 'o ut'"
    again = "merge"
    for name, value in values(line).items():
        again = filled_in(again, name, value)
    assert parse(again).params == parse(line).params


def test_a_quote_that_is_not_closed_changes_nothing() -> None:
    with pytest.raises(UsageError, match="a quote is not closed"):
        filled_in("collect", "dataset", "'a b")


def test_fields_complete_as_the_command_line_does(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data.jsonl").write_text("{}")
    view = SessionView()
    assert [c.text for c in completions("prune", "metric", "reap_s", view)] == [
        "reap_sum",
        "reap_sq",
    ]
    found = completions("collect", "dataset", "demo:mixed my", view)
    assert [(c.start, c.text) for c in found] == [(11, "'my data.jsonl'")]
    # A field for one word needs no quotes.
    assert [c.text for c in completions("save", "path", "my", view)] == ["my data.jsonl"]


def test_usage_lines_name_the_required_options() -> None:
    assert COMMANDS["domain-scan"].usage == (
        "domain-scan --domain DATASET --general DATASET --domain-name NAME --output PATH [OPTIONS]"
    )
    with pytest.raises(UsageError, match="usage: domain-scan --domain DATASET --general"):
        parse("domain-scan")


def test_what_is_needed_only_at_run_time_is_required_unless_another_option_replaces_it() -> None:
    assert problems("abliterate") == {"harmful": "required", "harmless": "required"}
    assert problems("abliterate --choose 2") == {}
    assert problems("prune") == problems("merge") == {"n_prune": "required"}
    assert problems("prune --expert-list kept.json") == {}
    assert problems("sae train out") == {"at": "required"}
    form = form_of("abliterate")
    assert form is not None
    assert [f.name for f in form.fields[:2]] == ["harmful", "harmless"]
    assert COMMANDS["abliterate"].usage.startswith("abliterate --harmful DATASET --harmless")
