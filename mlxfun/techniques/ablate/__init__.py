"""Project a direction of the residual stream out of the weights (abliteration)."""
