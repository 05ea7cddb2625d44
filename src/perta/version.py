"""The version, alone: every record carries it, and reading it imports nothing else."""

from __future__ import annotations

__version__ = "0.3.0.dev0"
