"""Per-parameter task arithmetic for unlearning."""
