"""Commands that make a model smaller, or mend what that cost, beside prune, merge and narrow."""
