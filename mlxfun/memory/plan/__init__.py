"""What a model needs, from the headers of its files alone."""
