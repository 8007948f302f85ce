"""Topics of experts: what is found where it is there, and nothing where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mlxfun.context import SILENT
from mlxfun.data.options import mixed
from mlxfun.evaluation.options import ProbeOptions
from mlxfun.scans.contrast import benjamini_hochberg
from mlxfun.scans.expert_profile import served_by
from mlxfun.scans.reports import Finding, ScanReport, ScanRow
from mlxfun.scans.token_classes import (
    LEAST_BLOCKS,
    candidates,
    findings,
    preferences,
)
from mlxfun.scans.topics import TopicBook
from mlxfun.session.session import Session

WORDS = ["the", " sun", " 1", " 42", " (", ")", " Paris", " moon", " da", "."]


class Vocabulary:
    """Says the word of a token."""

    def decode(self, ids: list[int]) -> str:
        return WORDS[ids[0]]


def text(samples: int = 20, length: int = 40, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, len(WORDS), length) for _ in range(samples)]


def routed(found: list[np.ndarray], experts: int = 6, seed: int = 1) -> np.ndarray:
    """Chance: two experts for every token. int [T, 2]."""
    rng = np.random.default_rng(seed)
    count = sum(map(len, found))
    return np.stack([rng.permutation(experts)[:2] for _ in range(count)])


def test_an_expert_of_numbers_is_found_and_no_other() -> None:
    samples = text()
    chosen, tokens = routed(samples), np.concatenate(samples)
    numbers = np.isin(tokens, [2, 3])
    chosen[numbers] = [0, 1]
    chosen[~numbers & (chosen == 0).any(axis=1)] = [2, 3]
    looked = candidates(samples, Vocabulary())
    told = findings(looked.names, preferences(looked, served_by(chosen, 6)))
    assert told[0].words == "numbers"
    assert "routed here: 100% of numbers, 0% of other tokens" in told[0].evidence
    assert told[1].words == "numbers"
    assert [one.words for one in told[4:]] == ["", ""]


def test_a_frequent_word_is_named_by_itself() -> None:
    samples = text()
    chosen = routed(samples)
    moon = np.concatenate(samples) == 7
    chosen[moon, 0] = 5
    chosen[~moon & (chosen == 5).any(axis=1)] = [2, 3]
    looked = candidates(samples, Vocabulary())
    assert findings(looked.names, preferences(looked, served_by(chosen, 6)))[5].words == "“moon”"


def test_chance_has_no_topics() -> None:
    named = 0
    for seed in range(10):
        samples = text(seed=seed)
        looked = candidates(samples, Vocabulary())
        found = preferences(looked, served_by(routed(samples, 32, seed), 32))
        named += sum(bool(one.words) for one in findings(looked.names, found))
    assert named == 0


def test_few_texts_prove_nothing_however_clear_they_are() -> None:
    samples = text(samples=LEAST_BLOCKS)
    chosen = routed(samples)
    numbers = np.isin(np.concatenate(samples), [2, 3])
    chosen[numbers] = [0, 1]
    chosen[~numbers & (chosen == 0).any(axis=1)] = [2, 3]
    looked = candidates(samples, Vocabulary())
    assert findings(looked.names, preferences(looked, served_by(chosen, 6)))[0] == Finding()


def test_the_figures_are_those_of_a_plain_loop() -> None:
    samples = text(samples=9, length=30)
    served = served_by(routed(samples, 4), 4)
    looked = candidates(samples, Vocabulary())
    found = preferences(looked, served)
    tokens = np.concatenate(samples)
    column = looked.names.index("numbers")
    for expert in range(4):
        differences, at = [], 0
        for sample in samples:
            inside = np.isin(sample, [2, 3])
            here = served[at : at + len(sample), expert]
            at += len(sample)
            differences.append(here[inside].mean() - here[~inside].mean())
        expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
        assert found.p[column, expert] == pytest.approx(max(expected, 0.5**9), rel=1e-9)
        numbers = np.isin(tokens, [2, 3])
        assert found.share[column, expert] == pytest.approx(served[numbers, expert].mean())
        assert found.other[column, expert] == pytest.approx(served[~numbers, expert].mean())
    assert benjamini_hochberg(found.p.reshape(-1)).min() > 0.01


def scan(name: str, state: str, *rows: tuple[int, int, float]) -> ScanReport:
    listed = tuple(ScanRow(layer, e, c, 0.2, 0.1, 0.001, 0.9, None) for layer, e, c in rows)
    return ScanReport(
        "domain",
        name,
        "x.json",
        state,
        "a",
        "b",
        (9, 9),
        (90, 90),
        64,
        90.0,
        0.01,
        {},
        {},
        4,
        listed,
    )


def test_scans_name_what_they_flag_and_topics_know_their_weights() -> None:
    book = TopicBook()
    book.note_scan(scan("Solidity", "s1", (0, 1, 0.9), (0, 2, -0.8)))
    book.note_scan(scan("Python", "s1", (0, 2, 0.5), (3, 1, 0.4)))
    book.note_profile(0, 1, Finding("numbers", "90%", 0.001), "s1")
    book.note_profile(0, 3, Finding(), "s1")
    words = book.words("s1")
    # The other side of a scan is no topic where there is another one; nothing is no topic.
    assert words == {(0, 1): "Solidity, numbers", (0, 2): "Python", (3, 1): "Python"}
    assert book.words("s2")[3, 1] == "Python (on other weights)"
    # A scan of the same name takes the place of the one before.
    book.note_scan(scan("Python", "s2", (3, 1, 0.4)))
    assert (0, 2) in book.words("s2")
    assert book.words("s2")[0, 2] == "general text (on other weights)"
    assert book.report("s2", 64).stale == 3


def test_the_demo_model_has_topics_and_a_dossier_agrees(tmp_path) -> None:
    session = Session.open("demo")
    try:
        options = ProbeOptions(mixed((("demo:mixed", 1.0),)), 1500)
        report = session.find_topics(options, SILENT)
        assert report.looked == report.experts
        heat = session.view().heat
        assert heat is not None
        assert heat.topics == {(t.layer, t.expert): t.words for t in report.rows}
        for topic in report.rows[:1]:
            dossier = session.dossier(topic.layer, topic.expert, options)
            # Fewer things are looked at for one expert: what is found of all is found of it.
            assert set(topic.words.split(", ")) & set(dossier.topic.split(", "))
    finally:
        session.close()
