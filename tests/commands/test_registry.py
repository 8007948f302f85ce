"""The registry: one declaration, from which lines, help, rows and completion come."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import registry
from commands.completion import complete
from commands.declare import GROUPS
from commands.registry import COMMANDS, help_text, parse
from commands.types import Size
from mlxfun.errors import UsageError
from mlxfun.session.reports import SessionView
from tests.commands.conftest import Bench

NAMES = {
    "load", "info", "layers", "collect", "stats show", "stats save", "stats load", "stats count",
    "stats reset", "prune", "merge", "plan show", "plan save", "steer", "preview", "evaluate", "chat", "apply", "discard", "flip",
    "compact", "undo", "redo", "history", "goto", "save", "smoke-test", "record", "replay",
    "expect", "set", "why", "help", "safety-scan", "domain-scan", "prepare-dataset",
    "stats diff", "stats merge", "stats purge", "stats subtract", "quit", "recover", "resume", "export heatmap", "export report", "export chat", "tokens", "serve",
    "abliterate", "refusals", "narrow", "compress", "distil", "bits", "tasks",
    "amplify", "bake", "recipe",
    "select", "probe", "ab", "stats rank", "name", "compare", "dossier", "topics", "export topics", "dataset", "workers", "models",
    "plan", "residency", "residency sweep", "profile save", "profile load",
    "trace", "difference", "lens", "attention", "patch", "attribute", "activations save", "probe-train", "tune-lens",
    "intervene", "vector make", "vector use", "vector list", "vector save",
    "sae train", "sae features", "sae use",
}  # fmt: skip


def error(line: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(line)
    return str(caught.value)


def options_of(name: str) -> set[str]:
    shown = [p for p in COMMANDS[name].click.params if not getattr(p, "hidden", False)]
    return {o for p in shown for o in p.opts if o.startswith("--")}


def test_the_commands_are_those_of_the_manual() -> None:
    assert set(COMMANDS) == NAMES


def test_prune_keeps_the_ancestors_option_names() -> None:
    assert options_of("prune") >= {
        "--n-prune", "--metric", "--strategy", "--model-wide", "--ignore-experts",
        "--min-experts-per-layer", "--expert-list", "--safety-map", "--safety-mode", "--domain-map",
        "--domain-mode", "--allow-stale",
    }  # fmt: skip


def test_merge_keeps_the_ancestors_option_names() -> None:
    assert options_of("merge") >= {
        "--n-prune", "--model-wide", "--expert-list", "--ignore-experts", "--similarity-mode",
        "--alignment", "--max-group-size", "--max-similarity-tokens", "--max-alignment-tokens",
        "--safety-map", "--safety-mode", "--domain-map", "--domain-mode",
    }  # fmt: skip


def test_amplify_keeps_the_ancestors_option_names() -> None:
    assert options_of("amplify") >= {"--domain-map", "--scale", "--threshold"}


def test_bake_needs_steering(bench: Bench) -> None:
    assert {r.name: r.reason for r in bench.engine.rows()}["bake"] == (
        "no experts are steered: run steer first"
    )
    bench.do("steer --deactivate 3:1")
    assert {r.name: r.enabled for r in bench.engine.rows()}["bake"]


def test_merge_stages_a_plan_without_statistics(bench: Bench) -> None:
    ended = bench.do("merge --dataset demo:mixed --max-samples 4 --n-prune 2 --alignment greedy")[
        -1
    ]
    assert ended.report.summary().startswith("staged merge: 6 experts pruned (8 -> 6 per layer)")


def test_data_options_are_the_same_wherever_a_data_set_is_read() -> None:
    shared = {"--dataset", "--text-key", "--max-samples", "--max-tokens", "--seed"}
    for name in ("collect", "evaluate", "preview", "merge", "amplify", "bake"):
        assert shared <= options_of(name)


def test_no_two_commands_share_a_key() -> None:
    keys = [c.key for c in COMMANDS.values() if c.key]
    assert len(keys) == len(set(keys))


def test_a_help_page_names_the_key_that_the_user_chose() -> None:
    end = "\n\nMore in the guide: help editing"
    assert help_text("apply").endswith("\n\nKey a; undo takes it back." + end)
    assert help_text("apply", {"apply": "ctrl+a"}).endswith(
        "\n\nKey ctrl+a; undo takes it back." + end
    )
    assert help_text("apply", {"apply": ""}).endswith("\n\nUndo takes it back." + end)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_command_explains_itself(name: str) -> None:
    command = COMMANDS[name]
    assert command.group in GROUPS
    page = help_text(name)
    assert page.startswith(f"Usage: {name}")
    assert command.short in " ".join(page.split())
    for option in options_of(name):
        assert f"{option} " in page or f"{option}\n" in page
    assert parse(f"{name} --help") == parse(f"help {name}")


def test_the_overview_names_every_command() -> None:
    lines = help_text(None).splitlines()
    assert {name for name in NAMES if any(x.startswith(f"  {name} ") for x in lines)} == NAMES


def test_help_of_a_family_shows_all_its_members() -> None:
    assert help_text("stats").count("Usage: stats ") == 10


def test_a_family_alone_means_its_first_member() -> None:
    assert parse("stats").command.name == "stats show"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "an empty line is no command: type help for a list"),
        ("prun --n-prune 4", "unknown command 'prun': did you mean prune?; type help for a list"),
        ("zzz", "unknown command 'zzz'; type help for a list"),
        (
            "stats sav x",
            "stats: unknown action 'sav': did you mean save?; "
            "choose one of show, save, load, count, reset, "
            "diff, merge, rank, purge, subtract",
        ),
        (
            "export",
            "'export' is not a command; choose one of export heatmap, export topics, "
            "export report, export chat",
        ),
        ("prune --n-prun 4", "prune: no such option --n-prun: did you mean --n-prune?"),
        ("prune --zzz", "prune: no such option --zzz; see help prune"),
        ("prune -x", "prune: no such option -x; see help prune"),
        (
            "prune --n-prune four",
            "prune: invalid value for '--n-prune': 'four' is not a valid integer",
        ),
        (
            "prune --n-prune 0",
            "prune: invalid value for '--n-prune': 0 is not in the range x>=1",
        ),
        ("prune --n-prune", "prune: option '--n-prune' requires an argument"),
        (
            "prune --metric rep",
            "prune: invalid value for '--metric': 'rep' is not one of 'freq', 'weighted_freq', "
            "'reap', 'ean', 'reap_sum', 'reap_sq', 'man', 'msan', 'output_error', 'auto'",
        ),
        ("undo 3", "undo: got unexpected extra argument (3); usage: undo"),
        ("save", "save: missing argument 'PATH'; usage: save [OPTIONS] PATH"),
        ("save ''", "save: invalid value for 'PATH': the path is empty"),
        ("save 'out", 'save: a quote is not closed in "save \'out"'),
        ("save out\\", "save: a lone \\ at the end in 'save out\\\\'"),
        (
            "steer --activate 3",
            "steer: invalid value for '--activate': '3' in '3' is not LAYER:EXPERT, such as 3:7",
        ),
        (
            "prune --ignore-experts 0,x",
            "prune: invalid value for '--ignore-experts': 'x' in '0,x' is not an expert number or a "
            "range such as 250..255",
        ),
        (
            "why 3:7,3:8",
            "why: invalid value for 'L:E': '3:7,3:8' names 2 experts: give one, for instance 3:7",
        ),
        ("help prun", "unknown command 'prun': did you mean prune?; type help for a list"),
    ],
)
def test_a_line_that_is_wrong_gets_one_sentence_with_the_remedy(line: str, message: str) -> None:
    if line.startswith("help"):
        with pytest.raises(UsageError) as caught:
            help_text(line.removeprefix("help "))
        assert str(caught.value) == message
    else:
        assert error(line) == message


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("calibrate", "collect"), ("Calibrate", "collect"), ("measure", "evaluate"),
        ("exit", "quit"), ("q", "quit"), ("open", "load"), ("write", "save"), ("w", "save"),
        ("diff", "stats diff"), ("quantize", "save --quantize"), ("commit", "apply"),
        ("back", "undo"), ("run", "replay"), ("ablate", "abliterate"), ("log", "history"),
        ("?", "help"), ("colect", "collect"), ("abliterat", "abliterate"), ("stear", "steer"),
    ],
)  # fmt: skip
def test_words_that_people_use_lead_to_the_command(word: str, command: str) -> None:
    said = f"unknown command {word!r}: did you mean {command}?; type help for a list"
    assert error(f"{word} something") == said
    with pytest.raises(UsageError) as caught:
        help_text(word)
    assert str(caught.value) == said


def test_every_synonym_leads_somewhere_and_hides_no_command() -> None:
    for words, target in ((w, t) for t, w in registry.SYNONYMS.items()):
        name = target.partition(" --")[0]
        assert name in COMMANDS
        assert target == name or f"--{target.partition(' --')[2]}" in {
            option for p in COMMANDS[name].click.params for option in p.opts
        }
        for word in words.split():
            assert word not in {n.split()[0] for n in COMMANDS}
    listed = [word for words in registry.SYNONYMS.values() for word in words.split()]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "word", ["calibrate", "measure", "print", "run", "impact", "result", "tree"]
)
def test_a_far_off_word_never_suggests_to_change_weights_or_to_lose_something(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MEANT", {})
    said = error(word)
    edits = (
        "prune",
        "narrow",
        "distil",
        "merge",
        "select",
        "abliterate",
        "amplify",
        "bake",
        "compact",
        "steer",
    )
    for name in (*edits, "resume", "discard"):
        assert name not in said


def test_an_expert_is_named_as_reports_name_it() -> None:
    for line in ("why 3:7", "why L3:E7", "why l3:e7"):
        assert parse(line).params["cell"] == (3, 7)
    steered = parse("steer --activate L3:E7,5:0..1 --deactivate 3:1").params
    assert steered["activate"] == {3: (7,), 5: (0, 1)}
    assert steered["deactivate"] == {3: (1,)}


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size.parse(text) == size


@pytest.mark.parametrize("text", ["9" * 400, "9" * 30 + "TiB", f"{2**63}"])
def test_a_size_beyond_all_machines_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is more than any machine holds"):
        Size.parse(text)


def test_rows_say_why_a_command_does_not_apply(bench: Bench) -> None:
    rows = {r.name: r for r in registry.rows(SessionView())}
    assert rows["load"].enabled
    assert (rows["apply"].enabled, rows["apply"].reason) == (
        False,
        "no model is loaded: type load PATH, or load demo",
    )
    rows = {r.name: r for r in bench.engine.rows()}
    assert rows["apply"].reason == "nothing is staged: run prune first"
    assert rows["stats show"].reason == "no statistics yet: run collect first"
    assert rows["undo"].reason == "nothing to undo"
    assert rows["collect"].enabled
    bench.do("collect --dataset demo:mixed", "prune --n-prune 1", "apply")
    rows = {r.name: r for r in bench.engine.rows()}
    assert rows["undo"].enabled
    assert rows["compact"].enabled
    assert (rows["redo"].enabled, rows["redo"].reason) == (False, "nothing to redo")
    assert rows["apply"].undoable
    assert rows["load"].danger


LINES_WITHOUT_ARGUMENTS = (
    "apply", "discard", "flip", "compact", "undo", "redo", "preview", "stats", "info", "layers",
    "history", "evaluate", "smoke-test",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES_WITHOUT_ARGUMENTS)
def test_a_command_is_greyed_exactly_when_it_would_fail(bench: Bench, line: str) -> None:
    for setup in ("info", "collect --dataset demo:mixed", "prune --n-prune 1", "apply", "undo"):
        bench.do(setup)
        name = parse(line).command.name
        enabled = next(r.enabled for r in bench.engine.rows() if r.name == name)
        before = bench.engine.view().state, bench.engine.view().plan
        ended = bench.run(line)
        assert (ended.error is None) == enabled, f"{line} after {setup}: {ended.error}"
        if ended.error is not None:
            assert (bench.engine.view().state, bench.engine.view().plan) == before
        elif line in ("apply", "discard", "undo", "redo"):
            break  # it moved on: the next setup would begin elsewhere


def test_completion_of_commands_options_and_values(bench: Bench) -> None:
    def texts(line: str) -> list[str]:
        return [c.text for c in bench.engine.complete(line)]

    bench.do("collect --dataset demo:mixed", "prune --n-prune 1", "apply")
    assert texts("pr") == [
        *("prepare-dataset", "preview", "probe", "probe-train", "profile", "prune"),
    ]
    assert texts("stats s") == ["save", "show", "subtract"]
    assert texts("prune --me") == ["--metric"]
    assert "--n-prune" in texts("prune ")
    assert texts("prune --metric reap_") == ["reap_sum", "reap_sq"]
    assert texts("collect --dataset demo:m") == ["demo:mixed", "demo:medical"]
    assert texts("collect --dataset=demo:p") == ["demo:python"]
    assert texts("load d") == ["demo"]
    assert texts("why ") == ["1:", "3:", "5:"]
    assert texts("why 3:") == ["3:1", "3:2", "3:3", "3:4", "3:5", "3:6", "3:7"]
    assert texts("steer --activate 1:7,5:") == [f"1:7,5:{e}" for e in range(1, 8)]
    assert texts("goto ") == ["0", "1"]
    assert texts("help pru") == ["prune", "pruning"]
    assert texts("help stats sh") == []
    assert texts("set met") == ["metric"]
    assert texts("set metric fr") == ["freq"]
    assert texts("chat hello wor") == []
    assert texts("no such thing") == []
    assert texts("save 'a") == []


def test_completion_says_where_the_word_begins_and_what_it_is() -> None:
    found = complete("stats  sa", SessionView())
    assert [(c.text, c.start) for c in found] == [("save", 7)]
    found = complete("app", SessionView())
    assert found[0].hint == "(no model is loaded: type load PATH, or load demo)"
    assert complete("hel", SessionView())[0].hint == (
        "Explain a command or show a guide; alone, list them all"
    )
    found = complete("collect --dataset=demo:mi", SessionView())
    assert [(c.text, c.start) for c in found] == [("demo:mixed", len("collect --dataset="))]


def test_paths_complete_and_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data.jsonl").touch()
    (tmp_path / "my notes.txt").touch()
    (tmp_path / "my dir").mkdir()
    (tmp_path / ".hidden.jsonl").touch()
    texts = [c.text for c in complete("collect --dataset m", SessionView())]
    assert texts == ["'my data.jsonl'", "'my dir/'"]
    texts = [c.text for c in complete("collect --dataset 'my d", SessionView())]
    assert texts == ["'my data.jsonl'", "'my dir/'"]
    texts = [c.text for c in complete("collect --dataset .h", SessionView())]
    assert texts == [".hidden.jsonl"]
    assert complete("save no/such/dir/", SessionView()) == []
