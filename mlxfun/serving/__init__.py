"""Serving the resident model: requests in batches on the model's own thread, and HTTP in front."""
