"""Perplexity, KL divergence, top-1 agreement and refusals of states of the weights."""
