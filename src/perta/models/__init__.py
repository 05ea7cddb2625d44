"""Models: found and loaded; their layers, their loss, and what they know of facts."""
