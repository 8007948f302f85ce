"""A few broken lines among many are left out, counted and named; many of them stop the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from mlxfun.data.datasets import Line, read_lines, tokenize
from mlxfun.data.describe import describe
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import DatasetError
from mlxfun.generation.answers import read_prompts
from mlxfun.scans.sample_routing import samples
from mlxfun.tally import DataUse, Tally

GOOD = json.dumps({"text": "some words of a sample"})
BROKEN = [
    ('{"text": "cut off', "not valid JSON"),
    ('{"text": 7}', "'text' must be a string, found a number"),
    ('{"body": "x"}', "no text under 'content'"),
    ('[{"text": "x"}]', "expected a JSON object, found a list"),
    ('{"text": "\\ud800"}', "'text' holds half a surrogate pair"),
    ('{"messages": [{"role": "user"}]}', "messages[] needs a 'role' and a 'content'"),
    ('{"messages": "hi"}', "'messages' must be a non-empty list, found a string"),
    ('{"n": ' + "1" * 5000 + "}", "a number of thousands of digits is no sample"),
    ("[" * 100_000, "nested too deeply to be a sample"),
]


def lines_with(path: Path, broken: dict[int, str], count: int = 100) -> Path:
    """A file of `count` lines; broken: {line number: what stands there}."""
    path.write_text("".join(broken.get(n, GOOD) + "\n" for n in range(1, count + 1)))
    return path


def read(path: Path) -> tuple[list[Line], DataUse]:
    tally = Tally()
    return read_lines(DatasetOptions(str(path)), tally), tally.uses()[0]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_each_kind_is_left_out_with_its_reason_and_where_it_stands(
    tmp_path: Path, text: str, reason: str
) -> None:
    lines, use = read(lines_with(tmp_path / "a.jsonl", {3: text, 40: text}))
    assert len(lines) == 98
    assert (use.read, use.refused, use.where) == (100, {reason: 2}, {reason: ("3", "40")})


def test_numbers_of_parts_do_not_make_a_reason_of_each_line(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}] * 3
    broken = {
        n + 1: json.dumps({"messages": [*turns[:n], {"role": "user", "content": 7}]})
        for n in range(4)
    }
    _, use = read(lines_with(tmp_path / "a.jsonl", broken))
    assert use.refused == {"'messages[].content' must be a string, found a number": 4}
    assert use.where == {
        "'messages[].content' must be a string, found a number": ("1", "2", "3"),
    }
    assert "4 'messages[].content' must be a string, found a number: 1, 2, 3, ..." in use.summary()


def test_up_to_one_in_ten_may_be_broken_and_no_more(tmp_path: Path) -> None:
    ten = dict.fromkeys(range(5, 15), "{")
    lines, use = read(lines_with(tmp_path / "a.jsonl", ten))
    assert (len(lines), use.refused) == (90, {"not valid JSON": 10})
    file = lines_with(tmp_path / "b.jsonl", ten | {99: "{"})
    with pytest.raises(DatasetError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}:5: not valid JSON (")
    assert "(11 of 100 lines are broken; up to 1 in 10 are left out" in str(caught.value)


def test_blank_lines_do_not_make_broken_ones_few(tmp_path: Path) -> None:
    blank = dict.fromkeys(range(11, 101), "")
    with pytest.raises(DatasetError, match=r"\(2 of 10 lines are broken"):
        read(lines_with(tmp_path / "a.jsonl", blank | {2: "{", 4: "{"}))


def test_a_file_that_is_not_utf8_is_one_of_the_files_of_a_directory(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n:02d}.py").write_text(f"print({n})")
    (tmp_path / "05.py").write_bytes(b"# caf\xe9")
    lines, use = read(tmp_path)
    assert (len(lines), use.refused, use.where) == (
        11, {"not UTF-8": 1}, {"not UTF-8": ("05.py",)},
    )  # fmt: skip


def test_what_is_no_object_in_an_array_is_one_of_its_records(tmp_path: Path) -> None:
    records: list[Any] = [json.loads(GOOD)] * 20
    records[7] = "a text"
    (tmp_path / "a.json").write_text(json.dumps(records))
    lines, use = read(tmp_path / "a.json")
    assert len(lines) == 19
    assert use.refused == {"expected a JSON object, found a string": 1}
    assert use.where == {"expected a JSON object, found a string": ("[7]",)}


class Alternating:
    """A tokenizer of a byte a token whose template wants the user to speak first."""

    has_chat_template = True
    chat_template = "{{ messages }}"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any, **_: Any) -> str:
        return bytes(int(t) for t in tokens).decode()

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[int]:
        if messages[0]["role"] != "user":
            raise TemplateError("Conversation roles must alternate user/assistant")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


def chats(count: int, refused: int) -> list[Line]:
    ask, say = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
    return [
        Line("messages", (say, ask, say) if n < refused else (ask, say), f"a:{n + 1}", source="a")
        for n in range(count)
    ]


REFUSED = "refuses this conversation: Conversation roles must alternate user/assistant"


def by_tokens(lines: list[Line], tally: Tally) -> int:
    return len(tokenize(lines, Alternating(), 64, tally=tally))  # type: ignore[arg-type]


def by_scan(lines: list[Line], tally: Tally) -> int:
    return len(samples(lines, Alternating(), 64, tally))  # type: ignore[arg-type]


@pytest.mark.parametrize("work", [by_tokens, by_scan])
def test_a_few_conversations_that_the_template_refuses_are_counted(work: Any) -> None:
    tally = Tally()
    assert work(chats(30, 3), tally) == 27
    (use,) = tally.uses()
    ((reason, count),) = use.refused.items()
    assert reason.endswith(REFUSED)
    assert (count, use.used, use.where[reason]) == (3, 27, ("1", "2", "3"))
    with pytest.raises(DatasetError, match=r"a:1: the model's chat template refuses .*4 of 30"):
        work(chats(30, 4), Tally())


def test_the_same_for_prompts_and_where_a_data_set_is_only_looked_at(tmp_path: Path) -> None:
    say = {"role": "assistant", "content": "say"}
    records = [{"messages": [say, {"role": "user", "content": "x"}]}] + [{"prompt": "x"}] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    options, tally = DatasetOptions(str(tmp_path / "a.jsonl")), Tally()
    found, skipped = read_prompts(options, Alternating(), None, tally)  # type: ignore[arg-type]
    assert (len(found), skipped, tally.uses()[0].used) == (20, 0, 20)
    assert sum(tally.uses()[0].refused.values()) == 1
    assert describe(options, Alternating(), None).samples == 20  # type: ignore[arg-type]


def test_a_sentence_names_only_so_many_reasons() -> None:
    refused = {f"reason {n}": n + 1 for n in range(12)}
    text = DataUse("a", 99, 1, refused=refused).summary()
    assert "8 reason 7" in text
    assert "reason 8" not in text
    assert "42 for 4 other reasons" in text
