"""Lets later layers see what was done to the layers before them, in one pass over the layers."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from mlxfun.context import SILENT, Context
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.live_experts import LiveExperts
from mlxfun.techniques.workspace import ResidentModel


class Follow:
    """Layers that are done, live for those behind them; swapped out when the block ends.

    Where layers are replayed (mlxfun.hooks.layerwise), the hidden states are all that later layers
    see of an edited one, so it is live only while they pass it. Where the whole model runs for
    every layer, all edited layers stay live.
    """

    def __init__(self, workspace: ResidentModel, carrier: Carrier, whole: bool = False) -> None:
        """whole: something else runs the whole model between the layers."""
        self._workspace, self._carrier = workspace, carrier
        self._stay = whole or carrier.obstacle is not None
        self._live = ExitStack()

    def passed(self, moe: LiveExperts, delta: LayerDelta, ctx: Context = SILENT) -> LayerDelta:
        """Take the layer as edited by `delta`; what is held of that (see ResidentModel.hold)."""
        resident = self._workspace.resident
        if self._stay:
            held = self._workspace.hold(delta)
            self._live.enter_context(self._workspace.trial(Delta((held,))))
            return held
        if moe.layer.position + 1 < len(resident.layers):
            with resident.trial(Delta((delta,))):
                self._carrier.arrive(moe.layer.index + 1, ctx)
        return self._workspace.hold(delta)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)
