"""The device that the model computes on: its memory, how much one forward takes, what is worth knowing."""
