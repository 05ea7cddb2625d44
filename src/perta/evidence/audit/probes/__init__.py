"""What the audit asks: one class a question."""
