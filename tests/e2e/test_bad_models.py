"""Models and data sets that cannot be read: one sentence with value and remedy, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

from tests.e2e.conftest import WEIGHTS, Shell, checkpoint, demo_copy

# --- models ----------------------------------------------------------------------------------


def not_a_model(path: Path) -> None:
    path.mkdir()


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


def truncated(path: Path) -> None:
    weights = demo_copy(path)
    weights.write_bytes(weights.read_bytes()[:-1000])


def corrupt(path: Path) -> None:
    weights = demo_copy(path)
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])


def corrupt_entry(path: Path) -> None:
    weights = demo_copy(path)
    weights.write_bytes(weights.read_bytes().replace(b'"dtype"', b'"dtyp!"', 1))


def incomplete(path: Path) -> None:
    demo_copy(path).unlink()


MODELS: dict[Callable[[Path], None], str] = {
    not_a_model: "m is not a model directory: it has no config.json",
    adapter: "m is a LoRA adapter (adapter_config.json), not a model; merge it into its base model "
    "with `mlx_lm.fuse` and load the result",
    truncated: f"m/{WEIGHTS} is truncated: its header needs 6,424,672 bytes and the file has "
    "6,423,672; download or copy the file again",
    corrupt: f"m/{WEIGHTS} is truncated or not a safetensors file: it announces a header of "
    "18,446,744,073,709,551,615 bytes and has 6,424,672 bytes in all; download or copy the file "
    "again",
    corrupt_entry: f"m/{WEIGHTS} is corrupt: the header entry of 'model.embed_tokens.weight' is "
    "malformed; download or copy the file again",
    incomplete: f"m/model.safetensors.index.json names 1 missing shard(s): {WEIGHTS}; finish the "
    "download",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_what_is_no_model_is_named_and_the_resident_one_stays(
    shell: Shell, make: Callable[[Path], None]
) -> None:
    make(Path("m"))
    before = {p: p.stat().st_mtime_ns for p in Path("m").iterdir()}
    assert shell.refused("load m") == MODELS[make]
    assert {p: p.stat().st_mtime_ns for p in Path("m").iterdir()} == before


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "no/such/model", "/no/such"])
def test_a_missing_path_is_named(shell: Shell, path: str) -> None:
    shown = path.removeprefix("./")
    assert shell.refused(f"load {path}") == (
        f"no such model directory: {shown}; name a directory, a Hub id OWNER/NAME, or 'demo'"
    )


# --- data sets -------------------------------------------------------------------------------

SETS = {
    "broken.jsonl": b'{"content": "a b"}\n{"content": \n',
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "key.jsonl": b'{"body": "a b"}\n',
    "list.jsonl": b"[1, 2]\n",
    "latin.jsonl": b'{"content": "\xe9"}\n',
}


@pytest.mark.parametrize("command", ["collect", "evaluate"])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("broken.jsonl", "broken.jsonl:2: not valid JSON (Expecting value at column 13); a data "
                         "set holds one JSON object a line (1 of 2 lines are broken; up to 1 in 10 are left out "
                         "and counted)"),
        ("empty.jsonl", "empty.jsonl holds no samples: it is empty; choose another "
                        "file"),
        ("blank.jsonl", "blank.jsonl holds no samples: every line of it is blank; choose another "
                        "file"),
        ("key.jsonl", "key.jsonl:1: no text under 'content' (keys seen: 'body'); choose one with "
                      "--text-key"),
        ("key.jsonl --text-key story", "key.jsonl:1: no text under 'story' (keys seen: 'body'); "
                                       "choose one with --text-key"),
        ("list.jsonl", "list.jsonl:1: expected a JSON object, found a list"),
        ("latin.jsonl", "latin.jsonl:1 is not UTF-8 (byte 0xe9 at offset 13); convert it to UTF-8"),
        ("sub", "sub has no .sol, .txt, .py, .md, .jsonl, .ndjson, .json, .parquet files to read; choose another directory"),
        ("demo:mixd", "there is no sample set demo:mixd; choose one of demo:mixed, demo:solidity, "
                      "demo:medical, demo:python, demo:harmful, demo:harmless, demo:eval"),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_be_read_is_named_with_its_line(
    shell: Shell, command: str, dataset: str, message: str
) -> None:
    Path("sub").mkdir()
    for name, content in SETS.items():
        Path(name).write_bytes(content)
    remembered = shell.do("set").report.data()["settings"]["dataset"]
    assert shell.refused(f"{command} --dataset {dataset}") == message
    assert shell.do("set").report.data()["settings"]["dataset"] == remembered == "demo:mixed"


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("collect --dataset demo:mixed --max-samples 1", "mixed.jsonl:"),
        ("evaluate --dataset demo:eval --max-samples 1", "eval.jsonl:"),
        ("chat hello", "the prompt:"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_before_memory_is_misread(
    fresh: Shell, line: str, where: str
) -> None:
    checkpoint(Path("small"), *tiny_models.build("qwen3_moe", vocab_size=64))
    fresh.do("load small")
    message = fresh.refused(line)
    assert where in message
    assert message.endswith(
        "the model knows 0..63; the tokenizer files are not this model's, copy them from its source"
    )
