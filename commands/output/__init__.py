"""Output: reports as text or JSON, progress lines, exported files."""
