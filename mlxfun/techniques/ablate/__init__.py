"""Ablation (abliteration): project a direction of the residual stream out of the weights."""
