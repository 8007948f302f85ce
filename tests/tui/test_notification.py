"""Calling back whoever turned to another window."""

from tui.notification import LONGEST, notification


def test_a_notification_is_one_sequence_whatever_the_text_contains() -> None:
    text = notification("prune\x1b\\ \x07--x", "line one\nline two\x9c")
    assert text == "\x1b]9;prune\\ --x: line one line two\x1b\\"


def test_a_long_text_is_cut() -> None:
    assert len(notification("save", "x" * 5000)) == LONGEST + len("\x1b]9;\x1b\\")
