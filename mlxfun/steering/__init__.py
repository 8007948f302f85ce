"""Steering: rules that force experts on or off, or bias them, while the model runs."""
