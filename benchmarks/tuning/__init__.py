"""Grids on which the race's contestants are tuned, and their results."""
