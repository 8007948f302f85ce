"""Raise or lower experts in their routers for good: amplify and bake."""
