"""Bounds on chat templates while they run: time, memory, and the length of what they make."""
