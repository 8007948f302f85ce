"""No command that writes costs anybody a file: the model's own, or one of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxfun.data import demo
from tests.e2e.conftest import COLLECT, Shell
from tests.mlxfun.exports import snapshot


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Path]]:
    """A shell on a copy of the demo model, with statistics and a staged plan; and the copy."""
    model = tmp_path_factory.mktemp("own") / "model"
    shutil.copytree(demo.model_path(), model)
    shell = Shell()
    shell.do(f"load {model}", COLLECT, "prune --n-prune 4", "chat --max-tokens 2 hello")
    yield shell, model
    shell.engine.close()


WRITERS = (
    "plan save {}/config.json",
    "plan save {}/new.json",
    "stats save {}/s.npz",
    "stats count on --auto-save {}/s.npz",
    "stats merge a.npz b.npz --output {}/m.npz",
    "stats subtract a.npz b.npz --output {}/m.npz",
    "stats purge a.npz --min-freq 1 --output {}/m.npz",
    "stats diff a.npz b.npz --output {}/tokenizer.json",
    "stats rank a.npz b.npz --n-prune 2 --output {}/config.json",
    "export heatmap {}/h.svg --force",
    "export report {}/README.md --force",
    "export chat {}/tokenizer.json --force",
    "domain-scan --domain demo:python --general demo:mixed --domain-name p --output {}/config.json",
    "save {} --force",
    "save {}/inside",
    "record {}/session.mlxfun",
)


@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.parametrize("through", ["the directory", "a link", "another spelling"])
def test_nothing_is_written_into_the_resident_model(
    own: tuple[Shell, Path],
    line: str,
    through: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell, model = own
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    shell.do("stats save a.npz", "stats save b.npz")
    place = {
        "the directory": model,
        "a link": tmp_path / "link",
        "another spelling": model / ".." / model.name,
    }[through]
    before = snapshot(model)
    refusal = shell.refused(line.format(place))
    assert "belongs to the model that is loaded from" in refusal
    assert refusal.endswith("; choose another place")
    assert snapshot(model) == before


def test_a_file_that_the_model_links_to_is_not_written_to_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.model_path(), "blobs")
    Path("snapshot").mkdir()
    for file in Path("blobs").iterdir():
        (Path("snapshot") / file.name).symlink_to(file.resolve())
    shell = Shell()
    try:
        shell.do("load snapshot")
        before = snapshot(Path("blobs"))
        assert "belongs to the model" in shell.refused("export report blobs/README.md --force")
        assert snapshot(Path("blobs")) == before
        shell.do("export report blobs/notes.md")
    finally:
        shell.engine.close()


@pytest.mark.parametrize(
    ("line", "name", "content", "kind"),
    [
        ("plan save", "config.json", '{"model_type": "x"}', "expert list"),
        ("plan save", "people.csv", "name,age\nann,3\n", "expert list"),
        ("stats save", "weights.npz", "PK junk", "routing statistics"),
        (
            "domain-scan --domain demo:python --general demo:mixed --domain-name p --output",
            "package.json",
            '{"name": "p"}',
            "report of a scan",
        ),
        ("stats diff a.npz a.npz --output", "package.json", "[]", "comparison of statistics"),
        ("stats merge a.npz a.npz --output", "data.npz", "PK junk", "routing statistics"),
        ("stats rank a.npz a.npz --n-prune 2 --output", "p.json", '{"name": 1}', "expert list"),
    ],
)
def test_a_file_of_another_kind_is_not_written_over(
    shell: Shell, line: str, name: str, content: str, kind: str
) -> None:
    shell.do("stats save a.npz", "prune --n-prune 4")
    Path(name).write_text(content)
    assert shell.refused(f"{line} {name}") == (
        f"{name} exists and is no {kind}; choose another name"
    )
    assert Path(name).read_text() == content


@pytest.mark.parametrize(
    ("line", "endings"),
    [
        ("plan save x.txt", ".json or .csv"),
        ("plan save x", ".json or .csv"),
        ("stats save notes.md", ".npz"),
        ("stats count on --auto-save notes.md", ".npz"),
        ("stats merge a.npz b.npz --output a.py", ".npz"),
        ("stats diff a.npz b.npz --output a.npz", ".json"),
        ("stats rank a.npz b.npz --n-prune 2 --output a.npz", ".json or .csv"),
        ("export heatmap x.gif", ".svg or .png or .pdf or .csv or .md"),
        ("export report x.txt", ".md"),
    ],
)
def test_what_is_written_has_the_ending_of_its_kind(shell: Shell, line: str, endings: str) -> None:
    shell.do("prune --n-prune 4")
    assert shell.refused(line, usage=True).endswith(f"must end in {endings}")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("line", ["stats save {}.npz", "plan save {}.json", "export report {}.md"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("dir", "is a directory; name a file in it"),
        ("/proc/x", "cannot write /proc/x."),
        ("file.md/x", ": Not a directory"),
        ("n" * 300, ": File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_sentence_and_leaves_nothing(
    shell: Shell, line: str, place: str, reason: str
) -> None:
    shell.do("prune --n-prune 4")
    for ending in ("npz", "json", "md"):
        Path(f"dir.{ending}").mkdir()
    Path("file.md").write_text("mine")
    before = sorted(map(str, Path().rglob("*")))
    refusal = shell.refused(line.format(place))
    assert reason in refusal
    assert "unexpected" not in refusal
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.parametrize("line", ["stats save {}.npz", "plan save {}.json", "export report {}.md"])
def test_parents_are_made_and_links_are_followed(shell: Shell, line: str) -> None:
    shell.do("prune --n-prune 4", line.format("deep/er/k"))
    (made,) = list(Path("deep/er").iterdir())
    Path(f"link{made.suffix}").symlink_to(made)
    made.write_bytes(b"")
    shell.do(line.format("link") + (" --force" if line.startswith("export") else ""))
    assert Path(f"link{made.suffix}").is_symlink()
    assert made.stat().st_size > 50


def test_a_name_that_no_file_system_takes_is_a_sentence_for_save_too(shell: Shell) -> None:
    assert "File name too long" in shell.refused(f"save {'n' * 300}")


def test_recover_renames_nothing_outside_the_output_root(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("outside", "root"):
        (tmp_path / place / "m.mlxfun-bak").mkdir(parents=True)
    monkeypatch.setattr(shell.engine._bench.files, "root", tmp_path / "root")
    assert "lies outside the output root" in shell.refused(f"recover {tmp_path}/outside", True)
    assert (tmp_path / "outside" / "m.mlxfun-bak").exists()
    shell.do("recover .")
    assert (tmp_path / "root" / "m").exists()


def test_a_list_written_by_plan_save_is_json(shell: Shell) -> None:
    shell.do("prune --n-prune 4", "plan save K.JSON")
    assert "keep_map" in json.loads(Path("K.JSON").read_text())


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("stats load {}.npz", False),
        ("collect --dataset {}.jsonl", False),
        ("load {}", False),
        ("load ./{}", False),
        ("prune --expert-list {}.json", False),
        ("steer --config {}.json", False),
        ("replay {}.mlxfun", True),
        ("export report ~nobody-here/x.md", True),
        ("load ~nobody-here/x", False),
        ("collect --dataset ~nobody-here/x", False),
    ],
)
def test_a_name_that_cannot_be_is_a_sentence_for_what_reads(
    shell: Shell, line: str, usage: bool
) -> None:
    refusal = shell.refused(line.format("n" * 300), usage)
    assert "unexpected" not in refusal


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r-report/report.json", '{"name": "mine"}', "exists and is no report of a recipe"),
        ("r-report/loss.svg", "my drawing", "exists and is no picture"),
        ("r-report", "a file", "Not a directory"),
    ],
)
def test_a_recipe_writes_over_nothing_of_yours_and_says_so_before_it_tries(
    shell: Shell, name: str, content: str, message: str
) -> None:
    Path("r.recipe").write_text(
        "collect --dataset gone.jsonl\nat most 9 MB\ntry prune --n-prune 4\n"
    )
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(content)
    refusal = shell.refused("recipe r.recipe")
    assert message in refusal
    assert Path(name).read_text() == content
