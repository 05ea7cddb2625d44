"""Computing in memory: gradients, moments, edits and training, for any method."""
