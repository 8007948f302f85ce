"""Routing statistics: collecting them, and the files that store, combine and rank them."""
