"""Patching: which component, put into another run, carries an answer over."""
