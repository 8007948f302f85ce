"""Techniques: each a planner (pure, statistics and options to a plan) and a per-layer function."""
