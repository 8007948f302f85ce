"""Bits per module: how many bits each weight is saved with, chosen by loss under a budget of bytes."""
