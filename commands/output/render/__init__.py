<<<<<<< .merge_file_fqDhs2
"""Reports drawn with Rich: one file for each kind of report."""
=======
"""Renderers of reports as text, with Rich; one module per kind of report."""
>>>>>>> .merge_file_qHHlqf
