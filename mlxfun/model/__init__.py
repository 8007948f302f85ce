"""What a loaded model consists of: anatomy, parameters, deltas, identity."""
