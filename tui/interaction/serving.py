"""Keys of the server beside the screen, and looking at what it does."""

from __future__ import annotations

from tui.interaction.base import KeyHandlers, Verbs
from tui.state import serving

LOOK_SECONDS = 0.25
"""How often the server is looked at."""


class ServingKeys(KeyHandlers):
    """The part of the application that shows the server."""

    _looked = float("-inf")

    def _serving_verbs(self) -> Verbs:
        return {"spotlight": self._spotlight}

    def _look(self) -> bool:
        """Take in what the server does; whether there is one, and it was time."""
        now = self._clock()
        if not self.state.view.serving or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        report = self.engine.serving()
        if report is None:
            return False
        self.state = serving.taken(self.state, report)
        return True

    def _spotlight(self) -> None:
        """Light the map by the selected request alone, or by all."""
        request = self.main.selected_request
        if request is None:
            self._say("info", "no request is selected")
            return
        self._change(serving.spotlight(self.state, request))
        shown = self.state.spotlight
        said = "by all requests" if shown is None else f"by request {shown} alone"
        self._say("info", f"the map lights up {said}")
