"""Differential scans: which experts two data sets use differently; and the profile of one
expert.
"""
