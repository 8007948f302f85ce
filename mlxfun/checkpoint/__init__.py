"""Checkpoints on disk: identity, loading, saving. Import the submodules; this page stays light."""
