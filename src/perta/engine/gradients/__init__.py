"""Powers of every example's own gradients, in batches."""
