"""Experts that are read from the checkpoint when a token is routed to them."""
