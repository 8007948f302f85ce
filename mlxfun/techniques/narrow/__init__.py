"""Narrower experts: neurons are taken out of every expert, and what is left is refitted."""
