"""What people and programs read: rendered reports, JSON, progress, exported heatmaps, the line shell."""
