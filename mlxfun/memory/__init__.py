"""Models larger than memory: experts in slots, and what fits how."""
