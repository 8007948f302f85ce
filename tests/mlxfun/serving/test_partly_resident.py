"""A served model with some experts on disk answers as the whole one does, several at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_rigs import serving

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


def test_several_answers_at_once() -> None:
    whole, _ = answers("load demo")
    partly, report = answers("load demo --capacity 3")
    assert partly == whole
    assert report.misses > 0
    assert report.capacity == 3
