"""Time to a target: every method of curvlib and torch's own optimizers on four tasks, each tuned with one budget."""
