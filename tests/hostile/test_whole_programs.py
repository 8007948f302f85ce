"""A bad file given to a whole program: one sentence on stderr, exit code 1 or 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_text import shown_characters

from tests.hostile.warm import Warm

FILES = {
    "replay": ("--headless", "--replay", "bad"),
    "recipe": ("--headless", "--demo", "-c", "recipe bad"),
    "data set": ("--headless", "--demo", "-c", "collect --dataset bad.jsonl"),
    "model": ("--headless", "bad", "-c", "info"),
    "configuration": ("--plain", "--config", "bad"),
}
DEEP, DIGITS, BINARY = "[" * 9000, "9" * 9000, "\0\x1b]52;c;x\x07\x9b"


@pytest.mark.parametrize("content", [DEEP, DIGITS, BINARY], ids=["deep", "digits", "binary"])
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_sentence_and_a_failure(
    warm: Warm, tmp_path: Path, name: str, content: str
) -> None:
    for file in ("bad", "bad.jsonl"):
        (tmp_path / file).write_text(content)
    done = warm.run(*FILES[name], directory=tmp_path)
    assert done.code in (1, 2), done.err
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err
    last = done.err.rstrip("\n").split("\n")[-1]
    assert last.startswith(("mlxfun-shell: ", "error: "))
    assert len(last) < 700
    assert shown_characters(last) == set()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "bad.jsonl"]
