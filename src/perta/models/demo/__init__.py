"""The models of the demonstration."""
