"""One expert at close quarters."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.context import SILENT
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluation.options import ProbeOptions
from mlxfun.scans import expert_profile
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import SelectOptions

DATA = ProbeOptions(DatasetOptions("demo:eval", max_samples=4, max_tokens=48), tokens=150)


@pytest.fixture(scope="module")
def session():
    session = Session.open("demo")
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=6, max_tokens=48)))
    yield session
    session.close()


def test_tokens_are_counted_as_one_by_one(session) -> None:
    report = session.dossier(2, 5, DATA)
    data = session._measurements._probe_set(DATA)
    left, served, seen = 150, Counter(), Counter()
    for sequence in data.sequences:
        part = sequence[:left]
        left -= len(part)
        if len(part) < 1:
            break
        with session.taps.recording(norms=False) as recording:
            session.model(mx.array(part)[None])
            record = recording.drain()[2][0]
            mx.eval(record.arrays())
        chosen = np.array(record.indices)[0]
        for token, experts in zip(part.tolist(), chosen.tolist(), strict=True):
            seen[token] += 1
            served[token] += 5 in experts
    assert (report.tokens, report.served) == (150, sum(served.values()))
    texts = {t: session.tokenizer.decode([t]) for t in seen}
    counted = {(texts[t], served[t], seen[t]) for t in seen if seen[t] >= 3 and served[t]}
    assert {(row.text, row.served, row.of) for row in report.top_tokens} <= counted
    shares = [row.served / row.of for row in report.top_tokens]
    assert shares == sorted(shares, reverse=True)
    assert len(report.top_tokens) == min(12, len(counted))


def test_steering_and_a_staged_plan_are_left_out_of_it(session) -> None:
    plain = session.dossier(2, 5, DATA)
    session.steer(SteerOptions(deactivate={2: (5,)}))
    session.select(SelectOptions(drop={2: (5,)}))
    again = session.dossier(2, 5, DATA)
    assert (again.served, again.top_tokens) == (plain.served, plain.top_tokens)
    assert session.view().live == "candidate"
    assert session.view().steering.deactivated == {2: (5,)}
    session.discard()
    session.steer(SteerOptions(clear=True))


def test_an_expert_that_is_gone_or_was_never_there_is_named(session) -> None:
    with pytest.raises(UsageError, match="layer 2 has no expert 99"):
        session.dossier(2, 99, DATA)
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (5,))))
    session.apply(ApplyOptions())
    with pytest.raises(StateError, match="L2:E5 is pruned"):
        session.dossier(2, 5, DATA)
    assert session.dossier(2, 6, DATA).partner not in (5, 6)
    session.undo()


def test_a_copy_of_an_expert_is_the_one_most_like_it(rig) -> None:
    r = rig("qwen3_moe")
    layer = r.anatomy.layers[0]
    for p in layer.parameters:
        array = mx.array(r.resident.tree.get(p.path))
        array[6] = array[2]
        r.resident.tree.put(p.path, array)
    text = [np.array([(7 * i + i * i) % 61 for i in range(40)], np.int32)]
    seen = expert_profile.watch(r.model, r.taps, 0, text, SILENT)
    modules = dict(r.model.named_modules())
    assert expert_profile.partner(r.resident.layers[0], modules, seen, 2)[:2] == (
        6,
        pytest.approx(1.0),
    )
    assert expert_profile.partner(r.resident.layers[0], modules, seen, 6)[0] == 2
    assert r.taps.layers[0].clients == []


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4", "gpt_oss", "longcat_flash", "dbrx"])
def test_every_kind_of_layer_can_be_watched(rig, name) -> None:
    r = rig(name)
    text = [np.array([(7 * i + i * i) % 61 for i in range(24)], np.int32)]
    seen = expert_profile.watch(r.model, r.taps, 0, text, SILENT)
    assert (len(seen.tokens), len(seen.experts)) == (24, 24)
    best, _, note = expert_profile.partner(
        r.resident.layers[0], dict(r.model.named_modules()), seen, 1
    )
    assert (best is None) == bool(note)
    assert best != 1
