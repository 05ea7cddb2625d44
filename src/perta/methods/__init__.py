"""The mathematics of unlearning: what each method computes, on tensors and numbers."""
