"""Session files: recording, replaying, resuming, expectations and recipes."""
