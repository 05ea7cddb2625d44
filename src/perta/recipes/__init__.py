"""Several stages in order: the whole unlearning, the demo, the comparison."""
