"""Models that do not fit in memory."""
