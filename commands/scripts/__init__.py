"""Running session files: replay, resume, expectations; reading recipes."""
