"""Steering vectors: from two sets of texts, in files with their provenance."""
