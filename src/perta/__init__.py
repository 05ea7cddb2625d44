"""Per-parameter task arithmetic for unlearning."""

__version__ = "0.1.0"
