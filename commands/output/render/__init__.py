"""Renderers of reports as text, with Rich; one module per kind of report."""
