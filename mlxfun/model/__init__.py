"""The loaded model: map of its parts, parameters, deltas, identity."""
