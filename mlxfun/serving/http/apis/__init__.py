"""One module for each API: from its requests to ours, and from our answers to its."""
