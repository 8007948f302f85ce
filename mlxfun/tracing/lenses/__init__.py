"""Reading what is inside: lenses, attribution, attention patterns, norms, probes."""
