"""Checkpoints on disk: headers, identity, loading, atomic saving, and the check after it."""
