"""The screen's tests must not depend on whoever runs them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wishes about colours, speed or drivers from outside."""
    for name in list(os.environ):
        wish = name.startswith("TEXTUAL") and not name.startswith("TEXTUAL_SNAPSHOT")
        if wish or name in ("NO_COLOR", "FORCE_COLOR", "SSH_CONNECTION"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
