"""The part of the session without MLX that is about memory: three of eight experts in slots."""

from __future__ import annotations

from mlxfun.memory.reports import ResidencyReport, SweepReport, SweepRow
from mlxfun.report import TextReport
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_state import EXPERTS, LAYERS, StubState


class ResidencyStub(StubState):
    """What is held in memory."""

    caveat = ""

    @as_in_session
    def residency(self, given: Given) -> ResidencyReport:
        return ResidencyReport(len(LAYERS), EXPERTS, 3, 300, 100, 900, 10, 6, 4, bytes_read=50)

    @as_in_session
    def forget_residency(self, given: Given) -> ResidencyReport:
        return ResidencyReport(len(LAYERS), EXPERTS, 3, 300, 100, 900)

    @as_in_session
    def sweep_residency(self, given: Given) -> SweepReport:
        rows = tuple(SweepRow(n, n * 100, 9.0 - n, n / 8, 10.0) for n in given.capacities or (2, 4))
        return SweepReport(rows, given.tokens, 3)

    @as_in_session
    def save_profile(self, given: Given) -> TextReport:
        given.path.write_text("{}")
        return TextReport("wrote the profile")

    @as_in_session
    def load_profile(self, given: Given) -> TextReport:
        return TextReport("3 experts a layer are held")
