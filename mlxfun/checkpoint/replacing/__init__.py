"""Replacing the directory of a model, whole or not at all."""
