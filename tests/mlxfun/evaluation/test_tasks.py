"""Tasks on the live side: through the real harness where it is installed, and else through a stand-in
that asks as it does.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from mlxfun import Session
from mlxfun.context import Context
from mlxfun.errors import Cancelled, DatasetError, UsageError
from mlxfun.evaluation.task_options import TaskOptions

INSTALLED = importlib.util.find_spec("lm_eval") is not None
QUESTIONS = [
    ("The capital of France is", [" Paris", " a large grey elephant of the zoo"], 0),
    ("def add(a, b):\n    return a +", [" violin music and the moon", " b"], 1),
    ("The sun rises in the", [" east", " import numpy as np"], 0),
]


@dataclass
class Instance:
    args: tuple[Any, ...]


class FakeManager:
    def __init__(self, include_path: str | None = None) -> None:
        self.all_tasks = ["choices", "answers", "broken"]


def fake_evaluate(model: Any, tasks: list[str], limit: int | None = None, **how: Any) -> Any:
    """What lm_eval.simple_evaluate asks of a model, and the form of what it returns."""
    if "broken" in tasks:
        raise FileNotFoundError("the Hub cannot be reached")
    some = QUESTIONS[:limit]
    pairs = [Instance((q, choice)) for q, choices, _ in some for choice in choices]
    likely = iter(model.loglikelihood(pairs))
    scores = [[next(likely)[0] for _ in choices] for _, choices, _ in some]
    right = [
        max(range(len(s)), key=s.__getitem__) == gold
        for s, (*_, gold) in zip(scores, some, strict=True)
    ]
    said = model.generate_until(
        [Instance((q, {"until": ["\n"], "max_gen_toks": 4})) for q, *_ in some]
    )
    whole = model.loglikelihood_rolling([Instance((q,)) for q, *_ in some])
    return {
        "results": {
            "choices": {
                "alias": "choices",
                "acc,none": sum(right) / len(right),
                "acc_stderr,none": 0.25,
                "length,strict": float(max(map(len, said))),
                "length_stderr,strict": "N/A",
                "rolling,none": sum(whole),
            }
        },
        "n-samples": {"choices": {"original": 3, "effective": len(some)}},
    }


@pytest.fixture
def harness(monkeypatch) -> None:
    """A stand-in for the package, in the shape that mlx_lm.evaluate and we import."""
    package, api, model, registry, tasks = (
        ModuleType(name)
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.tasks")
    )  # fmt: skip

    class LM:
        def __init__(self) -> None:
            self.cache_hook = None

    model.LM = LM
    registry.register_model = lambda *_: lambda kind: kind
    tasks.TaskManager = FakeManager
    package.simple_evaluate, package.__version__ = fake_evaluate, "0.0"
    for module in (package, api, model, registry, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield
    sys.modules.pop("mlx_lm.evaluate", None)


def test_likelihoods_and_answers_are_those_of_the_live_model(session, harness, capsys) -> None:
    report = session.tasks(TaskOptions(("choices",), limit=2))
    assert report.side == "current"
    rows = {row.metric: row for row in report.rows}
    assert set(rows) == {"acc", "length (strict)", "rolling"}
    assert (rows["acc"].error, rows["length (strict)"].error, rows["acc"].documents) == (
        0.25,
        None,
        2,
    )
    expected = 0.0
    for question, *_ in QUESTIONS[:2]:
        ids = session.tokenizer.encode(question, add_special_tokens=True)
        logits = session.model(mx.array(ids)[None])[0, :-1].astype(mx.float32)
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected += float(mx.take_along_axis(logp, mx.array(ids[1:])[:, None], axis=-1).sum())
    assert rows["rolling"].value == pytest.approx(expected, rel=1e-3)
    out, err = capsys.readouterr()
    assert out == err == "", "nothing is drawn over the screen"


def test_the_two_sides_are_scored_apart_and_the_model_stays_as_it_is(session, harness) -> None:
    from mlxfun.steering.options import SteerOptions

    plain = session.tasks(TaskOptions(("choices",)))
    session.steer(SteerOptions(deactivate={0: (1, 2, 3), 1: (4, 5)}))
    steered = session.tasks(TaskOptions(("choices",)))
    session.steer(SteerOptions(clear=True))
    assert [r.value for r in plain.rows] != [r.value for r in steered.rows]
    assert type(session.model).__call__.__qualname__.endswith("Model.__call__")
    assert [r.value for r in session.tasks(TaskOptions(("choices",))).rows] == [
        r.value for r in plain.rows
    ]


class Stopping(Context):
    def __init__(self) -> None:
        self.seen = 0

    def progress(self, label, done, total=None, unit="") -> None:
        self.seen = done

    def check(self) -> None:
        if self.seen >= 2:
            raise Cancelled("cancelled")


def test_a_cancel_acts_between_two_forwards(session, harness) -> None:
    stopping = Stopping()
    with pytest.raises(Cancelled):
        session.tasks(TaskOptions(("choices",)), stopping)
    assert stopping.seen == 2


def test_what_cannot_be_run_is_said_in_a_sentence(session, harness) -> None:
    with pytest.raises(UsageError, match=r"knows no task choice; near are choices"):
        session.tasks(TaskOptions(("choice",)))
    with pytest.raises(UsageError, match="at least one task"):
        session.tasks(TaskOptions(()))
    with pytest.raises(DatasetError, match=r"could not run broken: FileNotFoundError: the Hub"):
        session.tasks(TaskOptions(("broken",)))


def test_without_the_harness_the_extra_is_named(session, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'mlxfun\[eval\]'"):
        session.tasks(TaskOptions(("arc_easy",)))


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
def test_a_task_file_of_ones_own_runs_in_the_real_harness(session: Session, tmp_path: Path) -> None:
    lines = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "q.jsonl"}
test_split: test
doc_to_text: "{{{{q}}}}"
metadata: {{version: 1}}
"""
    (tmp_path / "ours.yaml").write_text(f"""task: ours_choice{common}
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    (tmp_path / "said.yaml").write_text(f"""task: ours_said{common}
output_type: generate_until
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""")
    options = TaskOptions(("ours_choice", "ours_said"), include=tmp_path, limit=3)
    report = session.tasks(options)
    rows = {(row.task, row.metric): row for row in report.rows}
    assert rows["ours_choice", "acc"].documents == 3
    assert 0 <= rows["ours_choice", "acc"].value <= 1
    assert rows["ours_said", "exact_match"].value >= 0
    assert report.version
