"""What the fake engine answers to commands on single experts: select, steer, dossier, ab and others."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from commands import registry
from mlxfun.calibration.reports import DiffReport, StatsReport, WhyReport
from mlxfun.editing.reports import PlanReport
from mlxfun.evaluation.reports import ProbeReport
from mlxfun.events import Event, Progress, Token
from mlxfun.generation.reports import ABReport, Answer
from mlxfun.report import Report, TextReport
from mlxfun.scans.reports import DossierReport, TopToken
from mlxfun.session.reports import SessionView
from mlxfun.steering.options import MapInForce
from mlxfun.steering.reports import SteerReport

MIB = 1 << 20
EXPERT_BYTES = MIB // 24
SELECTED = "0a1d0a1d"
CELLS = ((0, 1), (0, 2), (3, 4))
"""What every scan's report names here."""

# name, group, help, usage, when: see tests.fake_engine
COMMANDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("select", "edit", "Pick by hand which experts go.", "select [OPTIONS]", "model"),
    ("probe", "measure", "Measure the staged model quickly.", "probe [OPTIONS]", "plan"),
    ("ab", "chat", "Ask both sides.", "ab [OPTIONS] TEXT", "model"),
    ("stats diff", "observe", "Compare two files.", "stats diff A B", ""),
    ("name", "history", "Name a state.", "name NODE [LABEL]", "model"),
    ("compare", "history", "Measure two states.", "compare A B", "model"),
    ("compact", "edit", "Slice for real.", "compact", "model"),
    ("dossier", "observe", "Look at one expert.", "dossier L:E", "model"),
    ("plan save", "edit", "Write which experts stay.", "plan save PATH", "plan"),
)


def sets(text: str) -> dict[int, tuple[int, ...]]:
    """`"0:3,1:4..5"` as experts by layer."""
    out: dict[int, tuple[int, ...]] = {}
    for pair in text.split(",") if text else ():
        layer, experts = pair.split(":")
        low, _, high = experts.partition("..")
        many = tuple(range(int(low), int(high or low) + 1))
        out[int(layer)] = (*out.get(int(layer), ()), *many)
    return out


class FakeSelection:
    """A part of `FakeEngine`."""

    layers: int
    experts: int
    _view: SessionView

    def _option(self, args: list[str], name: str) -> str:
        return args[args.index(name) + 1] if name in args else ""

    def _do_select(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        heat = self._view.heat
        assert heat is not None
        gone = heat.condemned.copy()
        for option, value in (("--drop", True), ("--keep", False)):
            for layer, experts in sets(self._option(args, option)).items():
                gone[layer, list(experts)] = value
        pruned = {ly: tuple(np.flatnonzero(gone[ly]).tolist()) for ly in heat.layers}
        kept = {ly: tuple(np.flatnonzero(~gone[ly]).tolist()) for ly in heat.layers}
        scores = heat.metrics.get("reap_sum")
        plan = PlanReport(
            technique="prune",
            metric="reap_sum" if scores is not None else None,
            strategy="hand",
            experts_before=self.experts,
            experts_after=min(map(len, kept.values())),
            kept=kept,
            pruned=pruned,
            bytes_before=6 * MIB,
            bytes_after=6 * MIB - int(gone.sum()) * EXPERT_BYTES,
            delta_bytes=24_576,
            mass_lost=None
            if scores is None
            else {
                ly: float(scores[ly, list(e)].sum() / scores[ly].sum()) for ly, e in pruned.items()
            },
            state_after=f"{SELECTED}{int(gone.sum()):04d}",
        )
        self._view = replace(
            self._view,
            plan=plan if gone.any() else None,
            scores=None,
            live="candidate" if gone.any() else "base",
            heat=replace(heat, condemned=gone),
        )
        yield plan

    def _do_probe(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        assert self._view.plan is not None
        yield Progress(job, "probe", 1, 2, "batches", 0.2)
        state = self._view.plan.state_after
        yield ProbeReport(state, "held-out", 512, 14.9, 14.11, 0.0412, 0.93)

    def _do_steer(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        heat = self._view.heat
        assert heat is not None
        up, down = (sets(self._option(args, name)) for name in ("--activate", "--deactivate"))
        levels: dict[int, dict[int, float]] = {}
        for piece in filter(None, self._option(args, "--level").split(",")):
            cell, value = piece.split("=")
            layer, expert = map(int, cell.split(":"))
            levels.setdefault(layer, {})[expert] = float(value)
        flags = []
        for some, sign in ((up, 1), (down, -1)):
            flag = np.zeros((self.layers, self.experts), bool)
            for layer, experts in some.items():
                flag[layer, list(experts)] = True
            for layer, faders in levels.items():
                flag[layer, [e for e, x in faders.items() if x * sign > 0]] = True
            flags.append(flag)
        maps = registry.parse(shlex.join(["steer", *args])).params["maps"]
        uses: list[MapInForce] = []
        taken = {(ly, e) for some in (up, down) for ly, es in some.items() for e in es}
        for m in reversed(maps):
            cells = tuple(cell for cell in CELLS if cell not in taken)[: m.most]
            taken.update(cells)
            uses.insert(0, MapInForce(str(m.path), m.kind, m.mode, m.most, CELLS, cells))
            some = up if m.mode in ("safe", "boost") else down
            for layer, expert in cells:
                some[layer] = tuple(sorted({*some.get(layer, ()), expert}))
        report = SteerReport(up, down, levels=levels, maps=tuple(uses))
        heat = replace(heat, activated=flags[0], deactivated=flags[1])
        self._view = replace(self._view, heat=heat, steering=report)
        yield report

    def _routed(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        experts = np.array(
            [[(index + k * 5 + ly) % self.experts for k in range(2)] for ly in range(self.layers)],
            np.int32,
        )
        return experts, np.full(experts.shape, 0.5, np.float32)

    def _do_ab(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        left = ("Tea", " and", " toast", ",", " warm", ".")
        right = ("Tea", " and", " eggs", ",", " salted", " well", ".")
        if "at length" in args[-1]:
            right *= 40
        for index in range(max(len(left), len(right))):
            for side, pieces in (("base", left), ("candidate", right)):
                if index < len(pieces):
                    routed = self._routed(index + 2 * (side == "base"))
                    yield Token(job, side, index, index, pieces[index], *routed)
        ids = {piece: number for number, piece in enumerate((*left, *right))}
        answers = [
            Answer(side, label, "".join(some), some, tuple(ids[p] for p in some), "stop")
            for side, label, some in (
                ("base", "current", left),
                ("candidate", "candidate", right),
            )
        ]
        kl = (0.01, 0.02, 0.9, 0.1, 1.6, 0.05)
        yield ABReport(args[-1], answers[0], answers[1], 2, kl, 0)

    def _do_stats(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        if args[0] == "save":
            yield StatsReport(
                "save", (0,), 16, 32, 3840, 1.0, False, "a1b2c3d4", False, args[1], (), ()
            )
            return
        if args[0] != "diff":
            yield TextReport(f"stats {args[0]} done")
            return
        rows, columns = np.arange(self.layers)[:, None], np.arange(self.experts)[None, :]
        share = 0.04 * np.sin(columns * 0.4 + rows * 0.5)
        alike = {"reap_sum": 0.87, "freq": 0.9}
        yield DiffReport(
            (args[1], args[2]), None, (8, 8), (80, 80), alike, {"reap_sum": 0.75, "freq": 0.5}, (),
            (), tuple(range(self.layers)), {"reap_sum": share, "freq": share},
        )  # fmt: skip

    def _do_name(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        history = self._view.history
        assert history is not None
        nodes = tuple(
            replace(n, label=" ".join(args[1:])) if n.id == int(args[0]) else n
            for n in history.nodes
        )
        self._view = replace(self._view, history=replace(history, nodes=nodes))
        yield replace(history, nodes=nodes)

    def _do_dossier(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        layer, expert = (int(part) for part in args[0].split(":"))
        why = WhyReport(
            layer, expert, "kept", {"freq": 640.0, "reap_sum": 1.5}, {"freq": 2, "reap_sum": 3}, 16,
            "reap_sum 1.5 ranks 3 of 16",
        )  # fmt: skip
        top = (TopToken(" break", 9, 9), TopToken("[b]fast[/b]", 4, 6))
        yield DossierReport(why, "held-out", 512, 64, 0.41, top, (expert + 3) % 16, 0.81)
