"""Techniques that edit weights; each folder holds options, plan, per-layer function and report."""
