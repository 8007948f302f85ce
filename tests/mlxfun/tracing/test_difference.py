"""What an edit changes inside a forward: where it begins, how far it goes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mlxfun import Session
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import StateError, UsageError
from mlxfun.steering.options import SteerOptions
from mlxfun.techniques.prune.options import SelectOptions
from mlxfun.tracing.interventions import scale
from mlxfun.tracing.options import DifferenceOptions

TEXT = "The capital of France is"


@pytest.fixture
def session() -> Iterator[Session]:
    opened = Session.open("demo")
    yield opened
    opened.close()


def chosen(session: Session, layer: int) -> list[int]:
    with session.trace(TEXT) as t:
        saved = t.layers[layer].router.choice.save()
    return sorted(set(np.array(saved).reshape(-1).tolist()))


def test_nothing_differs_from_the_checkpoint_before_an_edit(session: Session) -> None:
    found = session.difference(DifferenceOptions(TEXT))
    assert found.first == ""
    assert all(x in (0.0, None) for row in found.rows for x in row[1:])
    assert max(found.kl) == 0
    assert "bit for bit" in found.summary()


def test_a_prune_of_one_layer_begins_there_and_is_measured_against_every_state(session) -> None:
    used = chosen(session, 3)[:2]
    session.select(SelectOptions(drop={3: tuple(used)}))
    staged = session.difference(DifferenceOptions(TEXT, "base"))
    whole = session.difference(DifferenceOptions(TEXT))
    assert staged.first == whole.first == "layers.3.router.choice"
    assert staged.rows == whole.rows
    for layer, *changes in staged.rows:
        assert all(x == 0 for x in changes) == (layer < 3)
    assert staged.rows[3][1] == 0  # the attention ahead of the experts is the same
    assert 0 < staged.rows[3][2] <= 1
    session.flip("base")
    assert session.difference(DifferenceOptions(TEXT)).first == ""
    assert session.difference(DifferenceOptions(TEXT, "base")).rows == staged.rows
    assert session.editor.side == "base"
    session.discard()


def test_the_sizes_are_those_of_the_values(session: Session) -> None:
    with session.trace(TEXT) as t:
        before, logits = t.layers[4].residual.save(), t.output.save()
    session.intervene("layers.2.mlp.output", scale(0.5))
    with session.trace(TEXT) as t:
        after, others = t.layers[4].residual.save(), t.output.save()
    found = session.difference(DifferenceOptions(TEXT))
    assert found.first == "layers.2.mlp.output"
    a, b = np.array(before), np.array(after)
    assert found.rows[4][4] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (np.array(logits)[0].astype(float),
                                                                  np.array(others)[0].astype(float)))  # fmt: skip
    assert np.allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), atol=1e-5)


def test_nodes_of_the_history_are_compared_as_weights(session: Session) -> None:
    session.select(SelectOptions(drop=dict.fromkeys(range(6), (1, 2))))
    session.apply(ApplyOptions())
    session.steer(SteerOptions(activate={0: (5,)}))
    here, key = session.view().history.current, session.editor.key()
    found = session.difference(DifferenceOptions(TEXT, "0"))
    assert found.against == "node 0"
    assert found.first.startswith("layers.")
    assert session.difference(DifferenceOptions(TEXT, "1")).first == ""
    assert (session.view().history.current, session.editor.key()) == (here, key)


def test_states_that_are_none_are_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="is no state"):
        session.difference(DifferenceOptions(TEXT, "yesterday"))
    with pytest.raises(StateError, match="nothing is staged"):
        session.difference(DifferenceOptions(TEXT, "base"))
    with pytest.raises(StateError, match="there is no history node 9"):
        session.difference(DifferenceOptions(TEXT, "9"))
