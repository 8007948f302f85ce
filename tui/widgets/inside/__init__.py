"""Maps of what was seen inside a forward: a lens, an attention head, a patching result."""
