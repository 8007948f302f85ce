"""Reports for a person, drawn with Rich: one file for each kind of report."""
