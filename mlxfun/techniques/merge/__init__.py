"""Merging: average experts into those most similar to them (REAM)."""
