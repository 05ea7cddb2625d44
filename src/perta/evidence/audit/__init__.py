"""The audit: probes that look for what was removed, and how each is judged."""
