"""What all parts of the stub session share: the model's size, its tree of states, the staged plan."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from mlxfun.editing.reports import HistoryNode, PlanReport
from mlxfun.errors import ModelError, StateError
from mlxfun.evaluation.reports import EvaluateReport
from mlxfun.steering.options import SteerOptions
from mlxfun.steering.reports import SteerReport

LAYERS = (1, 3, 5)
EXPERTS = 8
TOP_K = 2
EXPERT_BYTES = 1000


class StubState:
    """A model whose edits are numbers of experts left out. `gate`: see `StubSession`."""

    def __init__(self, source: str | Path, seed: int = 0, gate: threading.Event | None = None):
        if str(source) not in ("demo", "other") and not Path(source).is_dir():
            raise ModelError(f"{source} is neither a directory nor a model on the Hub")
        self.source = str(source)
        self.seed = seed
        self.gate = gate
        self.command = ""
        self.threads: set[int] = set()
        self.closed = False
        self.nodes = [HistoryNode(0, None, "load", self._hash(()), 0)]
        self.dropped: dict[int, tuple[int, ...]] = {0: ()}
        self.current = 0
        self.plan: PlanReport | None = None
        self.scores: EvaluateReport | None = None
        self.live = "base"
        self.samples = 0
        self.counting = False
        self.auto_save: Path | None = None
        self.steering = SteerReport({}, {})
        self.steered: SteerOptions | None = None
        self.turns = 0
        self.taken = 0
        self.compacted = False

    def _hash(self, dropped: tuple[int, ...]) -> str:
        return hashlib.blake2b(f"{self.source}{dropped}".encode(), digest_size=6).hexdigest()

    @property
    def state(self) -> str:
        self.threads.add(threading.get_ident())
        return self.nodes[self.current].state

    @property
    def gone(self) -> tuple[int, ...]:
        return self.dropped[self.current]

    def _staged(self) -> PlanReport:
        if self.plan is None:
            raise StateError("nothing is staged: run prune first")
        return self.plan

    def _drop_plan(self) -> None:
        self.plan, self.scores, self.live = None, None, "base"
