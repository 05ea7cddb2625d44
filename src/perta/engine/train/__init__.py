"""Training in memory: fine-tuning, and unlearning by training."""
