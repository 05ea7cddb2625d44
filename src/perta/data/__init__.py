"""Rows, examples and tokens: from what users have to what models read."""
