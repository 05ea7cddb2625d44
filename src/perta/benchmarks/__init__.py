"""Standard unlearning benchmarks, one module each: splits, metrics, aggregation."""
