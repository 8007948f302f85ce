"""Reports drawn with Rich: one file for each kind of report."""
