"""The verdict: what is forgotten and what is kept, by how much, and how sure that is."""
