"""What is measured of a model on a set: importance and moments, in memory and in files."""
