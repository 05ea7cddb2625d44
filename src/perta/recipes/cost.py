"""What a run costs in operations: a forward pass over one token counts 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perta.store.record import read_manifest

FORWARD, BACKWARD = 1, 2


def training_passes(folder: Path) -> float:
    """Operations of a finished training, in forward passes over one token."""
    record: Mapping[str, Any] = read_manifest(folder) or {}
    return (FORWARD + BACKWARD) * float(record.get("tokens", 0))
