"""Ranges of numbers: statistics and where to clip."""
