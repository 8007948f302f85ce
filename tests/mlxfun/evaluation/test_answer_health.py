"""Whether answers end: figures of loops and natural ends, in preview and as a guardrail of apply."""

from __future__ import annotations

import pytest

from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import StateError
from mlxfun.evaluation.answer_health import health, loops, repeated
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.generation.options import GenerateOptions
from mlxfun.techniques.prune.options import SelectOptions

STOP = 2


def test_a_tail_that_goes_round_is_a_loop_and_a_long_answer_is_not() -> None:
    assert loops([9, 8, 1, 2, 3] + [4, 5, 6] * 8)
    assert loops([7] * 24)
    assert loops(list(range(50)) * 3)
    assert not loops([7] * 23), "too short to tell"
    assert not loops(list(range(50)) * 2), "two rounds can be a refrain"
    assert not loops([4, 5, 6] * 20 + list(range(30))), "it came out of it"
    assert not loops(list(range(65)) * 3 + [1]), "no period of 64 tokens or less"
    assert not loops([])


def test_repetition_counts_what_stood_before() -> None:
    assert repeated([1, 2, 3, 4, 5, 6]) == 0
    assert repeated([1] * 13) == pytest.approx(9 / 10)
    assert repeated([1, 2]) == 0


def test_figures_are_shares_of_the_answers() -> None:
    found = health([[5, 6, STOP], [7] * 40, [*range(10, 30)], [7] * 39 + [STOP]], frozenset({STOP}))
    assert found.answers == 4
    assert found.ended == 0.5
    assert found.loops == 0.25, "one that ended did not go on for ever"
    assert found.tokens == (3 + 40 + 20 + 40) / 4
    assert 0 < found.repetition < 1


@pytest.fixture
def ruined(session):
    """A staged plan that takes a quarter of the experts, whichever they are."""
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (0, 1, 2, 3))))
    yield session
    if session.editor.staged is not None:
        session.discard()


def asked(answers: int) -> EvaluateOptions:
    data = DatasetOptions("demo:python", max_samples=4, max_tokens=32)
    return EvaluateOptions((data,), answers=answers, answer_tokens=30)


def test_preview_judges_the_candidate_beside_the_checkpoint(ruined) -> None:
    report = ruined.preview(asked(3))
    assert report.answers is not None
    assert report.answers_before is not None
    assert report.answers.answers == report.answers_before.answers == 3
    # The same prompts, answered by the shell one by one.
    from mlxfun.evaluation.samples import _prompts

    prompts = _prompts(asked(3), [], ruined.tokenizer, 3)
    alone = [ruined.greedy(tokens, GenerateOptions(max_tokens=30)).tokens for tokens, _ in prompts]
    assert report.answers.tokens == pytest.approx(sum(len(a) + (len(a) < 30) for a in alone) / 3), (
        "the token that ends an answer counts"
    )
    assert ruined.preview(asked(0)).answers is None


def test_apply_refuses_more_loops_than_it_is_allowed(ruined, monkeypatch) -> None:
    report = ruined.preview(asked(3))
    worse = health([[7] * 40] * 3, frozenset())
    better = health([[5, 6, STOP]] * 3, frozenset({STOP}))
    known = ruined._measurements._preview

    def seen(now, before) -> None:
        from dataclasses import replace

        ruined._measurements._preview = replace(
            known, report=replace(report, answers=now, answers_before=before)
        )

    seen(worse, better)
    with pytest.raises(StateError, match=r"100\.0% of the answers go round in circles"):
        ruined.apply(ApplyOptions(max_loops=0.5))
    assert ruined.editor.staged is not None
    seen(better, better)
    ruined.apply(ApplyOptions(max_loops=0.5))
    assert ruined.editor.staged is None


def test_a_guardrail_on_loops_makes_the_preview_that_it_needs(session) -> None:
    from mlxfun.calibration.options import CollectOptions
    from mlxfun.techniques.prune.options import PruneOptions

    data = DatasetOptions("demo:mixed", max_samples=6, max_tokens=32)
    session.collect(CollectOptions(data))
    session.prune(PruneOptions(n_prune=2))
    session.preview(EvaluateOptions((DatasetOptions("demo:python", max_samples=2, max_tokens=16),)))
    session.apply(ApplyOptions(max_loops=1.0))
    assert session.editor.staged is None
