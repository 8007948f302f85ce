"""Commands that look inside a model, and that intervene in its forwards."""
