"""Models larger than memory: experts in slots, streamed layers, and what fits how."""
