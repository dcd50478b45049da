"""Parts of `benchmarks.batch`: jobs, both contestants, and the check of every token."""
