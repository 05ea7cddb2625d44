"""Benchmarks of others, with the metrics and the form of results of their own evaluation."""
