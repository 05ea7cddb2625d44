"""The report: records and results in, one page out."""
