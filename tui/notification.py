"""Desktop notifications through the terminal (OSC 9), for long jobs that have ended."""

from __future__ import annotations

from tui.text import shortened

LONGEST = 200


def notification(title: str, text: str) -> str:
    """The OSC 9 sequence, which some terminals show as a desktop notification and others ignore.

    Control characters are dropped: what a command line or a report contains must not end the
    sequence early.
    """
    said = shortened(f"{title}: {text}", LONGEST)
    return f"\x1b]9;{''.join(char for char in said if char.isprintable())}\x1b\\"
