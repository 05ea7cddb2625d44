"""What shows that something is gone or kept: measures, benchmarks, statistics."""
