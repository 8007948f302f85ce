"""Front ends without a screen: headless runs, the line-by-line shell, and what both print."""
