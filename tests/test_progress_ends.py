"""What mlxfun.events says of progress holds where it is shown."""

from __future__ import annotations

from mlxfun.events import JobStarted, Progress, Token
from tui.state.app_state import AppState
from tui.state.reducer import reduce


def test_reading_the_prompt_is_over_with_the_first_token_of_the_answer() -> None:
    reading = Progress(1, "reading the prompt", 1941, 1941, "tokens", 2.0)
    state = AppState()
    for event in (JobStarted(1, "replay s.mlxfun"), JobStarted(2, "chat hi")):
        state = reduce(state, event, 0.0)
    outer = Progress(1, "replaying", 3, 9, "commands", 2.0)
    for event in (outer, Progress(2, "reading the prompt", 512, 1941, "tokens", 1.0)):
        state = reduce(state, event, 1.0)
    state = reduce(state, Token(2, "base", 0, 5, "Hello"), 2.0)
    assert state.job is not None
    assert state.job.progress is None
    assert state.jobs[0].progress == outer, "of the job around it nothing has ended"
    again = Progress(2, reading.label, 512, 700, "tokens", 0.1)
    assert reduce(state, again, 3.0).jobs[-1].progress == again, "the other side of an A/B reads"
