"""Least-squares refits and the layer-by-layer calibration pass, shared by prune and merge."""
