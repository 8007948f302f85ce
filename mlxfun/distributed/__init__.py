"""Passes over a data set on several processes, on one machine or several, joined by mx.distributed."""
