"""Files: checkpoints, importance, moments and records, read and written whole or not at all."""
