"""Models whose decoder layers are in memory only while they run."""
