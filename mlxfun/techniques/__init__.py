"""Techniques that change the weights. Each folder holds options, plan, per-layer function and report."""
