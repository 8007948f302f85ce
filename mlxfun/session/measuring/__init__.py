"""What a session measures: evaluation, refusals, the smoke test, variants of a recipe."""
