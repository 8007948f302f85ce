"""Output without a screen: reports as text or JSON, progress, exported files, the line shell."""
