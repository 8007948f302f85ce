"""Data sets, expert lists, scan reports, and the bundled demo."""
