"""Bad input, through the engine that every front end drives: one sentence with value and remedy.

`Shell.refused` also holds that the model, the plan, the history and the statistics are as before.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from commands.runners.event_printer import EventPrinter
from tests.e2e.conftest import COLLECT, Shell, checkpoint, demo_copy

LAYERS, EXPERTS = 6, 16


# --- statistics ------------------------------------------------------------------------------


def statistics(path: str, layers: int, experts: int, **more: Any) -> None:
    names = ("reap_sum", "reap_count", "ean_sum", "freq", "weighted_freq_sum")
    sums = {name: np.ones((layers, experts)) for name in names}
    np.savez(path, **sums, num_layers=layers, num_experts=experts, **more)


def test_statistics_of_another_shape_are_refused(shell: Shell) -> None:
    statistics("s.npz", 4, 16)
    assert shell.refused("stats load s.npz") == (
        "s.npz holds statistics of 4 x 16 (layers x experts) but the model has 6 x 16; collect on "
        "this model, or load the model they were made on"
    )


def test_statistics_of_another_model_of_the_same_shape_are_refused(shell: Shell) -> None:
    shell.do("stats save s.npz")
    with np.load("s.npz") as archive:
        found = {key: archive[key] for key in archive.files}
    (key,) = [k for k, v in found.items() if str(v) == shell.checkpoint]
    found[key] = np.array("0" * 32)
    np.savez("other.npz", **found)
    message = shell.refused("stats load other.npz")
    assert message.startswith("other.npz was made on demo, not on demo (")
    assert message.endswith("); collect on this model")


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04junk"])
def test_a_file_that_holds_no_statistics_is_named(shell: Shell, content: bytes) -> None:
    Path("s.npz").write_bytes(content)
    assert shell.refused("stats load s.npz") == (
        "s.npz is not an .npz of routing statistics, or is damaged; give a file written by "
        "`stats save`"
    )


# --- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--n-prune 15", "--n-prune 15 would leave 1 of 16 experts, but layer 0 routes every token "
                         "to 2 experts; at most --n-prune 14 is possible"),
        ("--n-prune 99", "--n-prune 99 is more than the 16 experts of a layer; at most --n-prune "
                         "14 is possible"),
        ("--n-prune 4 --safety-map map.json", "--n-prune 4 would leave 12 of 16 experts, but layer "
         "0 has only 2 unprotected experts; at most --n-prune 2 is possible"),
        ("--n-prune 4 --ignore-experts 0..13", "--n-prune 4 would leave 12 of 16 experts, but "
         "layer 0 has only 2 unprotected experts; at most --n-prune 2 is possible"),
        ("--n-prune 4 --safety-map bad.json", "bad.json is not valid JSON (Expecting property name "
         "enclosed in double quotes: line 1 column 2 (char 1)); write it anew"),
        ("--n-prune 4 --safety-map gone.json",
         "cannot read gone.json: No such file or directory; check the path"),
        ("--n-prune 4 --domain-map gone.json",
         "cannot read gone.json: No such file or directory; check the path"),
        ("--n-prune 4 --domain-map map.json",
         "map.json has no table 'domain_experts' of experts by layer; give a report that has"),
        ("--n-prune 4 --domain-map bad.json --domain-mode target", "bad.json is not valid JSON "
         "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); write it "
         "anew"),
        ("--n-prune 2 --ignore-experts 77",
         "--ignore-experts names 77; the experts of this model are 0..15"),
        ("--expert-list list.json",
         "list.json: layer 0 names unknown experts 99; they are 0..15"),
        ("--expert-list bad.json", "bad.json is not valid JSON (Expecting property name enclosed "
         "in double quotes: line 1 column 2 (char 1)); write it anew"),
    ],
)  # fmt: skip
def test_a_prune_that_cannot_be_is_refused_with_the_figures(
    shell: Shell, line: str, message: str
) -> None:
    critical = {str(layer): list(range(14)) for layer in range(LAYERS)}
    document = {"num_layers": LAYERS, "num_experts": EXPERTS, "safety_critical": critical}
    Path("map.json").write_text(json.dumps(document))
    Path("bad.json").write_text("{")
    Path("list.json").write_text('{"keep_map": {"0": [1, 99]}}')
    assert shell.refused(f"prune {line}") == message


def test_an_unreadable_map_leaves_the_plan_that_was_staged(shell: Shell) -> None:
    shell.do("prune --n-prune 2")
    shell.refused("prune --n-prune 4 --safety-map gone.json")  # compares the plan
    assert shell.engine.view().plan.experts_after == 14


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("why 3:99", "layer 3 has no expert 99; they are 0..15"),
        ("why 99:1", "decoder layer 99 is not an MoE layer; they are 0..5"),
        ("steer --activate 3:99", "layer 3 has no expert 99; they are 0..15"),
        ("steer --deactivate 9:1", "decoder layer 9 is not an MoE layer; they are 0..5"),
    ],
)
def test_an_unknown_expert_is_answered_with_those_that_there_are(
    shell: Shell, line: str, message: str
) -> None:
    assert shell.refused(line, usage=line.startswith("why")) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("undo", "nothing to undo: the model is as it was loaded"),
        ("redo", "nothing to redo: no edit was undone here"),
        ("goto 7", "there is no history node 7; they are 0..0"),
        ("apply", "nothing is staged to apply; stage a plan first, e.g. with prune"),
        ("apply --max-kl 1", "nothing is staged to apply; stage a plan first, e.g. with prune"),
        ("discard", "nothing is staged to discard; stage a plan first, e.g. with prune"),
        ("flip", "nothing is staged to flip; stage a plan first, e.g. with prune"),
        ("preview", "nothing is staged to preview; stage a plan first, e.g. with prune"),
        ("compact",
         "nothing to compact: no pruned experts are held in memory; apply a prune first"),
    ],
)  # fmt: skip
def test_a_step_that_the_state_does_not_allow_says_what_does(
    fresh: Shell, line: str, message: str
) -> None:
    assert fresh.refused(line) == message


def test_pruning_without_statistics_says_what_to_run(fresh: Shell) -> None:
    assert fresh.refused("prune --n-prune 4") == (
        "prune needs statistics or a list: run `collect --dataset ...` or `stats load FILE` "
        "first, or give --expert-list FILE"
    )


def test_a_prune_that_breaks_a_group_names_the_nearest_that_do_not(fresh: Shell) -> None:
    checkpoint(Path("grouped"), *tiny_models.build("deepseek_v3", vocab_size=4096))
    fresh.do("load grouped")
    fresh.do("collect --dataset demo:mixed --max-samples 2 --max-tokens 8")
    assert fresh.refused("prune --n-prune 3") == (
        "--n-prune 3 cannot be taken evenly from the router's 2 groups of experts; the nearest "
        "possible: --n-prune 2 or --n-prune 4"
    )


# --- saving ----------------------------------------------------------------------------------


def test_an_existing_output_is_left_alone(shell: Shell) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert shell.refused("save out") == ("out is not empty; choose another place or add --force")
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"]


def test_the_directory_it_was_loaded_from_is_never_replaced(fresh: Shell) -> None:
    weights = demo_copy(Path("model"))
    before = weights.read_bytes()
    fresh.do("load model")
    for path in ("model", "model/../model", "model/inside", "."):
        assert "model" in fresh.refused(f"save {path} --force")
    assert weights.read_bytes() == before
    assert [p.name for p in Path().iterdir()] == ["model"]


def test_a_full_disk_is_refused_with_the_figures_before_anything_is_written(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    message = shell.refused("save out")
    assert message.startswith(f"saving to {tmp_path}/out needs ")
    assert message.endswith("1.0 MiB is free; make room or choose another disk")
    assert list(Path().iterdir()) == []


# --- lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prun --n-prune 4", "unknown command 'prun': did you mean prune?; type help for a list"),
        ("prune --n-prun 4", "prune: no such option --n-prun: did you mean --n-prune?"),
        ("stats sho", "stats: unknown action 'sho': did you mean show?; choose one of show, save, "
                      "load, count, reset, diff, merge, rank, purge, subtract"),
        ("prune --n-prune", "prune: option '--n-prune' requires an argument"),
        ("prune --n-prune four",
         "prune: invalid value for '--n-prune': 'four' is not a valid integer"),
        ("replay bad.mxs", "bad.mxs:2: unknown command 'prun': did you mean prune?; type help for "
                           "a list"),
        ("replay mark.mxs", "mark.mxs:1: '#= bogus' is not of the form '#= state ID' or '#= state "
                            "ID staged ID'"),
        ("replay quote.mxs", 'quote.mxs:1: undo: a quote is not closed in "undo \'x"'),
        ("replay gone.mxs",
         "cannot read the replay file gone.mxs: No such file or directory"),
        ("recipe gone.recipe", "cannot read the recipe gone.recipe: No such file or directory"),
    ],
)  # fmt: skip
def test_a_line_that_means_nothing_gets_the_nearest_that_does(
    shell: Shell, line: str, message: str
) -> None:
    Path("bad.mxs").write_text("collect --dataset demo:mixed\nprun --n-prune 4\n")
    Path("mark.mxs").write_text("#= bogus\n")
    Path("quote.mxs").write_text("undo 'x\n")
    assert shell.refused(line, usage=True) == message


# --- text that looks like something else -----------------------------------------------------

MARKUP = "[red]hi[/red] [/] \x1b[31mred\x1b]0;title\x07"


def test_markup_in_data_prompts_and_paths_is_text(
    shell: Shell,
) -> None:
    Path("m.jsonl").write_text(json.dumps({"content": MARKUP + " more words"}) + "\n")
    shown = io.StringIO()
    printer = EventPrinter(shell.engine, out=shown, err=shown)
    for line in (
        f"chat --max-tokens 2 {MARKUP}",
        "collect --dataset m.jsonl --add",
        f"load '{MARKUP}'",
        "evaluate --dataset m.jsonl --samples 1 --sample-tokens 2 --no-kl",
    ):
        printer.follow(shell.engine.run(line))
    assert "\x1b" not in shown.getvalue()
    assert "\x07" not in shown.getvalue()
    assert "no such model directory: [red]hi[/red] [/] ␛[31mred␛]0;title␇;" in shown.getvalue()
    shell.do(COLLECT)


def test_a_sentence_is_one_line_whatever_was_typed(shell: Shell) -> None:
    for line in ("load 'a\nb'", "prune --expert-list 'a\nb.json'", "collect --dataset 'a\nb'"):
        ended = shell.run(line)
        assert ended.error is not None
        assert "\n" not in ended.error.replace("a\nb", "")


@pytest.mark.parametrize(
    "line",
    [
        "steer --domain-map {}",
        "prune --n-prune 2 --domain-map {}",
        "amplify --dataset demo:mixed --domain-map {}",
        "merge --dataset demo:mixed --n-prune 2 --domain-map {}",
    ],
)
def test_a_map_of_another_model_is_refused_with_both_names(shell: Shell, line: str) -> None:
    empty: dict[str, list[int]] = {str(i): [] for i in range(LAYERS)}
    document = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "model": "f" * 8, "model_name": "other",
        "composite_score": [[0.5] * EXPERTS] * LAYERS, "general_experts": empty,
        "domain_experts": empty | {"1": [4]},
    }  # fmt: skip
    Path("d.json").write_text(json.dumps(document))
    assert shell.refused(line.format("d.json")) == (
        "d.json was made on the model other (ffffffff), this is demo; scan "
        "again, or use it knowingly with --allow-stale"
    )
