"""asv benchmarks of curvlib: one class a question, construction in `setup`, fixed seeds."""
