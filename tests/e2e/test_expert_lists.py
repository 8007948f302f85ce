"""Expert lists go out and come back in, and never remove what a map protects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import COLLECT, Shell

LAYERS, EXPERTS = 6, 16


def protect(path: Path, experts: list[int]) -> Path:
    """A safety map that protects `experts` in the first MoE layer."""
    document = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "safety_critical": {"0": experts},
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("name", ["list.json", "list.csv"])
def test_a_saved_plan_stages_the_same_state_again(shell: Shell, name: str) -> None:
    staged = shell.do("prune --n-prune 4").report.data()
    written = shell.do(f"plan save {name}").report
    assert written.summary() == f"wrote {name}: 72 of 96 experts kept, 24 pruned"
    shell.do("discard")
    again = shell.do(f"prune --expert-list {name}").report.data()
    assert again["state_after"] == staged["state_after"]
    assert again["kept"] == staged["kept"]


def test_after_apply_the_list_is_that_of_the_applied_prune(shell: Shell, tmp_path: Path) -> None:
    kept = shell.do("prune --n-prune 4").report.data()["kept"]
    shell.do("apply", "plan save list.json")
    found = json.loads((tmp_path / "list.json").read_text())
    assert found["layer_indices"] == list(range(LAYERS))
    assert found["keep_map"] == kept


def test_plan_show_is_the_report_of_the_prune(shell: Shell) -> None:
    staged = shell.do("prune --n-prune 4").report
    assert shell.do("plan show").report.data() == staged.data()
    assert shell.do("plan").report.data() == staged.data()


def test_without_a_plan_there_is_nothing_to_show_or_to_write(shell: Shell, tmp_path: Path) -> None:
    assert shell.refused("plan show") == (
        "nothing is staged to show: stage a plan first, e.g. with prune"
    )
    assert shell.refused("plan save list.json") == (
        "there is no list to write: nothing is staged or pruned: run prune first"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_could_not_be_read_back_is_not_written(shell: Shell, tmp_path: Path) -> None:
    shell.do("select --drop 0:1")
    assert "keep different numbers of experts (15 to 16)" in shell.refused("plan save list.json")
    assert list(tmp_path.iterdir()) == []
    shell.do("select --even", "plan save list.json")


def test_a_list_may_not_remove_what_a_map_protects(shell: Shell, tmp_path: Path) -> None:
    gone = shell.do("prune --n-prune 4").report.data()["pruned"]["0"]
    shell.do("plan save list.json", "discard")
    path = protect(tmp_path / "safety.json", gone[:2])
    assert shell.refused(f"prune --expert-list list.json --safety-map {path}") == (
        f"the list removes 2 protected experts: L0:E{gone[0]}, L0:E{gone[1]}; change the list or "
        "the map"
    )
    kept = sorted(set(range(EXPERTS)) - set(gone))
    protect(path, kept[:2])
    shell.do(f"prune --expert-list list.json --safety-map {path}")


@pytest.mark.parametrize("option", ["--safety-map", "--domain-map"])
def test_an_unreadable_map_stops_a_list_too(shell: Shell, option: str) -> None:
    shell.do("prune --n-prune 4", "plan save list.json", "discard")
    assert shell.refused(f"prune --expert-list list.json {option} gone.json") == (
        "cannot read gone.json: No such file or directory; check the path"
    )


def test_experts_to_ignore_bind_a_list_too(shell: Shell) -> None:
    gone = shell.do("prune --n-prune 4").report.data()["pruned"]["0"][0]
    shell.do("plan save list.json", "discard")
    found = shell.refused(f"prune --expert-list list.json --ignore-experts {gone}")
    assert f"L0:E{gone}" in found


def test_a_list_for_fewer_experts_is_not_taken_for_one_of_this_model(
    shell: Shell, tmp_path: Path
) -> None:
    keep = {str(i): list(range(6)) for i in range(LAYERS)}
    (tmp_path / "l.json").write_text(json.dumps({"original_num_experts": 8, "keep_map": keep}))
    assert shell.refused("prune --expert-list l.json") == (
        "l.json is for a model with 8 experts per layer; this model has 16"
    )


@pytest.mark.parametrize("name", ["list.json", "list.csv"])
def test_a_list_of_another_checkpoint_is_used_and_said_to_be_one(
    shell: Shell, tmp_path: Path, name: str
) -> None:
    shell.do("prune --n-prune 4", f"plan save {name}", "discard")
    plain = shell.do(f"prune --expert-list {name}").report
    assert not any("was made on the model" in text for text in plain.warnings)
    other = "f" * 32
    text = (tmp_path / name).read_text()
    assert shell.checkpoint in text
    (tmp_path / name).write_text(text.replace(shell.checkpoint, other))
    for line in ("prune", "merge --dataset demo:mixed --max-samples 2 --max-tokens 16"):
        warned = shell.do(f"{line} --expert-list {name}").report.warnings
        (found,) = [text for text in warned if "was made on the model" in text]
        assert other in found
        assert found.endswith(f"this is demo ({shell.checkpoint})")


def test_ranks_of_a_pruned_model_choose_among_the_living(shell: Shell) -> None:
    shell.do("prune --n-prune 4", "apply")
    for name in ("python", "solidity"):
        shell.do(
            f"collect --dataset demo:{name} --max-samples 4 --max-tokens 48",
            f"stats save {name}.npz",
        )
    line = "stats rank python.npz solidity.npz --n-prune 2"
    shell.do(f"{line} --output keep.json")
    staged = shell.do(f"{line} --stage").report
    assert [len(experts) for experts in staged.chosen.values()] == [2] * LAYERS
    assert shell.engine.view().plan.experts_after == 10
    kept = shell.engine.view().plan.kept
    shell.do("discard", "prune --expert-list keep.json")
    assert shell.engine.view().plan.kept == kept
    shell.do("discard", "goto 0", COLLECT)
