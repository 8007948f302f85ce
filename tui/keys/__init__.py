"""The keys of the screen, as data, and their labels."""
