"""Average experts into those most like them (REAM)."""
