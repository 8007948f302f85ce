"""Permanent router edits that raise or lower experts: amplify and bake."""
