"""The commands, one module per theme; each is declared once, with its help and its options."""
