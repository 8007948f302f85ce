"""The commands, one module per theme. Each is declared once, with its help and its options."""
