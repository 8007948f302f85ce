"""The passes that workers can run: what is wanted of a batch, by the name of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mlxfun.calibration import collect
from mlxfun.evaluation import evaluator
from mlxfun.generation import answers
from mlxfun.hooks.forwards import Watch
from mlxfun.scans import sample_routing
from mlxfun.techniques.ablate import directions
from mlxfun.techniques.prune import super_experts

if TYPE_CHECKING:
    from mlxfun.arrays import Array
    from mlxfun.data.datasets import Batch
    from mlxfun.session.session import Session

Settings = Mapping[str, Any]
Given = Mapping[str, "Array"]
Pass = Callable[["Session", "Batch", Settings, Given], Watch["Array"]]
"""(session, a batch, the task's settings, what goes along with the batch) -> its watch."""


def _routing_sums(session: Session, batch: Batch, _: Settings, __: Given) -> Watch[Array]:
    return collect.watch(session.model, session.taps, batch)


def _sample_routing(session: Session, batch: Batch, _: Settings, given: Given) -> Watch[Array]:
    return sample_routing.watch(session.model, session.taps, batch, given["answers"])


def _expert_peaks(session: Session, batch: Batch, _: Settings, __: Given) -> Watch[Array]:
    return super_experts.watch(session.model, session.taps, batch)


def _residual_means(session: Session, batch: Batch, settings: Settings, _: Given) -> Watch[Array]:
    modules = dict(session.model.named_modules())
    layers = [modules[path] for path in settings["layers"]]
    return directions.watch(session.model, layers, batch)


def _hidden_states(session: Session, batch: Batch, _: Settings, __: Given) -> Watch[Array]:
    return Watch(partial(session.evaluator.states, batch))


def _answers(session: Session, batch: Batch, settings: Settings, _: Given) -> Watch[Array]:
    return answers.watch(session.model, batch, settings)


PASSES: Mapping[str, Pass] = {
    collect.PASS: _routing_sums,
    sample_routing.PASS: _sample_routing,
    super_experts.PASS: _expert_peaks,
    directions.PASS: _residual_means,
    evaluator.PASS: _hidden_states,
    answers.PASS: _answers,
}
