"""A chat template that raises, makes nothing or would fill the memory, through every command that
uses it: one sentence, exit 1, nothing touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile.spoiled import require_refused
from tests.hostile.warm import Warm, tree

SMALL = "--max-samples 8 --max-tokens 16"
COMMANDS = (
    "chat --max-tokens 2 hi",
    "smoke-test --prompt hi",
    f"collect --dataset chats.jsonl {SMALL}",
    f"evaluate --dataset chats.jsonl {SMALL}",
    "evaluate --dataset demo:eval --max-samples 2 --max-tokens 16 --samples 1 --dataset chats.jsonl",
    f"refusals --harmful chats.jsonl --harmless chats.jsonl {SMALL}",
    f"abliterate --harmful chats.jsonl --harmless chats.jsonl {SMALL}",
    f"safety-scan --harmful chats.jsonl --benign chats.jsonl --output made.json {SMALL}",
    f"domain-scan --domain chats.jsonl --general demo:mixed --domain-name p --output made.json {SMALL}",
    "dataset chats.jsonl",
    f"merge --n-prune 2 --dataset chats.jsonl {SMALL}",
)
STEERED = (f"bake --dataset chats.jsonl {SMALL}",)
STAGED = ("ab hi", f"preview --dataset chats.jsonl {SMALL}")
ALL = (*COMMANDS, *STEERED, *STAGED)
TEMPLATES = {
    "raises": ("{{ raise_exception('users\x1b[2J come \u202e first') }}", "refuses this conversation"),
    "fills the memory": ("{{ ('x' * 10 ** 6) * 10 ** 6 }}", "makes more than 16,777,216 characters"),
    "is broken": ("{% if messages %}", "refuses this conversation"),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(warm: Warm) -> Path:
    here = warm.directory
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    (here / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    warm.lines("load demo", "collect --dataset demo:mixed --max-samples 4", "stats save s.npz")
    return here


@pytest.mark.parametrize("line", ALL)
def test_a_template_that_fails_is_one_sentence_in_every_command(
    warm: Warm, here: Path, line: str
) -> None:
    number = ALL.index(line)
    names = list(TEMPLATES)
    chosen = names if line.startswith(("chat", "collect")) else [names[number % len(names)]]
    for name in chosen:
        template, said = TEMPLATES[name]
        (here / "t.jinja").write_text(template)
        before = tree(here)
        prepared = ["load demo --chat-template t.jinja", "stats load s.npz"]
        prepared += ["prune --n-prune 2"] if line in STAGED else []
        prepared += ["steer --rule additive --activate 3:7"] if line in STEERED else []
        words = [word for text in [*prepared, line] for word in ("-c", text)]
        ended = warm.run("--headless", *words)
        require_refused(ended, f"{line}: {name}")
        assert said in ended.last, ended.last
        assert ended.code == 1
        assert tree(here) == before
