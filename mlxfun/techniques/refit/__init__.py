"""Least-squares refits and the layer-by-layer calibration pass that several techniques share."""
