"""Widgets of the panels that show and steer experts."""
