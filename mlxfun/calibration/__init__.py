"""Collect routing statistics, and the files they are kept, combined and ranked in."""
