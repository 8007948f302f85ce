"""Copy to the clipboard: with pbcopy on macOS, elsewhere by OSC 52, which is not confirmed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

SECONDS = 2.0


def copy(text: str, ask_terminal: Callable[[str], None], platform: str = sys.platform) -> str:
    """Copy `text`; returns a sentence on what was done. ask_terminal: sends OSC 52."""
    lines = text.count("\n") + 1
    size = f"{len(text):,} characters" if lines == 1 else f"{lines} lines"
    if platform == "darwin" and _pbcopy(text):
        return f"copied {size} with pbcopy"
    ask_terminal(text)
    return f"sent {size} to the terminal's clipboard (OSC 52; not every terminal takes it)"


def _pbcopy(text: str) -> bool:
    try:
        done = subprocess.run(
            ["pbcopy"], input=text.encode(), timeout=SECONDS, check=False, capture_output=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
