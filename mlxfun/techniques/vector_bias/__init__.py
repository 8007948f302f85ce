"""Steering vectors written into biases."""
