"""Checkpoints on disk: headers, identity, loading, atomic saving, verification."""
