"""The edit: planned from headers, computed chunk by chunk, streamed from files to files."""
