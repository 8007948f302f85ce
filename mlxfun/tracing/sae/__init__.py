"""Sparse autoencoders of one value of a forward: training, files, features."""
