"""Pruning: remove experts by a metric, an expert list, calibration forwards or manual selection."""
