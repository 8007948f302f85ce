"""Widgets of the chat panel."""
