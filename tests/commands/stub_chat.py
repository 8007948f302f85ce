"""The part of the stub session that scans text, and talks."""

from __future__ import annotations

from mlxfun.data.reports import DatasetReport, Lengths
from mlxfun.errors import Cancelled, StateError
from mlxfun.events import Token
from mlxfun.generation.reports import ChatReport, TokensReport
from mlxfun.scans.options import ScanOptions
from mlxfun.scans.reports import ScanReport, ScanRow
from tests.commands.session_signatures import Given, as_in_session
from tests.commands.stub_state import EXPERTS, LAYERS, StubState


class ChatStub(StubState):
    """Scans and answers."""

    @as_in_session
    def dataset(self, given: Given) -> DatasetReport:
        lengths = Lengths(2, 3, 3.0, 4, 4, 12)
        source = given.options.source
        return DatasetReport(source, 4, {"prompt": 4}, "tokens", lengths, "hi", 512)

    @as_in_session
    def safety_scan(self, given: Given) -> ScanReport:
        return self._scan("safety", given.options)

    @as_in_session
    def domain_scan(self, given: Given) -> ScanReport:
        return self._scan("domain", given.options)

    def _scan(self, technique: str, options: ScanOptions) -> ScanReport:
        return ScanReport(
            technique=technique,
            name=options.domain_name or "safety",
            path=str(options.output),
            state=self.state,
            first=options.first.source,
            second=options.second.source,
            samples=(4, 4),
            tokens=(40, 40),
            experts=EXPERTS * len(LAYERS),
            threshold_percentile=options.threshold_percentile,
            alpha=options.alpha,
            more={3: (5,)},
            less={},
            by_percentile=2,
            rows=(ScanRow(3, 5, 1.0, 0.25, 0.125, 0.0001, 1.0, None),),
            notices=("few",),
        )

    @as_in_session
    def chat(self, given: Given) -> ChatReport:
        if given.options.side == "candidate":
            self._staged()
        words = f"turn {self.turns}: {given.text}".split(" ")
        said, reason = "", "stop"
        for index, word in enumerate(words[: given.options.max_tokens]):
            piece = word if not index else " " + word
            said += piece
            given.ctx.emit(Token(0, self.live, index, index, piece))
            try:
                given.ctx.check()
            except Cancelled:
                return ChatReport(given.text, said, self.live, 5, 0, index, 50.0, "cancelled")
            given.ctx.interlude()
        self.turns += 1
        return ChatReport(given.text, said, self.live, 5, 0, len(words), 50.0, reason)

    @as_in_session
    def take_back(self, given: Given) -> str:
        if given.count > self.turns:
            raise StateError(f"the conversation has {self.turns} questions to take back")
        self.turns -= given.count
        self.taken = given.count
        return "what was asked"

    @as_in_session
    def give_back(self, given: Given) -> None:
        self.turns += self.taken

    @as_in_session
    def reset_chat(self, given: Given) -> None:
        self.taken, self.turns = self.turns, 0

    @as_in_session
    def count_tokens(self, given: Given) -> TokensReport:
        count = len(given.text.split())
        return TokensReport(count, 0, count + 5, 512)
