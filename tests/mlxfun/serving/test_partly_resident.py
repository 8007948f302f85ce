"""A served model with some experts on disk answers as the whole one does, several at a time."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving_rigs import serving
from slot_rigs import cut_short

from mlxfun.data import demo

QUESTIONS = ("What is a mortgage?", "Name a colour.", "How do I tie a knot?")


def answers(load: str) -> tuple[list[str], Any]:
    def ask(question: str) -> str:
        body = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 8,
        }
        status, found, _ = served.post("/v1/chat/completions", body)
        assert status == 200, found
        return str(found["choices"][0]["message"]["content"])

    with serving(load) as served, ThreadPoolExecutor(3) as pool:
        said = list(pool.map(ask, QUESTIONS))
        return said, served.run("residency")


def test_a_file_that_is_gone_for_a_while_costs_only_the_answers_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(demo.model_path(), path)
    (file, *_) = path.glob("model*.safetensors")

    def ask(question: str) -> tuple[int, Any]:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0,
                "max_tokens": 8}  # fmt: skip
        status, found, _ = served.post("/v1/chat/completions", body)
        return status, found["choices"][0]["message"]["content"] if status == 200 else found

    with serving(f"load {path} --capacity 3") as served:
        before = [ask(question) for question in QUESTIONS]
        assert [status for status, _ in before] == [200] * 3
        with cut_short(file):
            status, said = ask("Why is the sky blue at noon?")
        assert status >= 500
        assert "unharmed" in str(said)
        assert [ask(question) for question in QUESTIONS] == before


def test_several_answers_at_once() -> None:
    whole, _ = answers("load demo")
    partly, report = answers("load demo --capacity 3")
    assert partly == whole
    assert report.misses > 0
    assert report.capacity == 3
