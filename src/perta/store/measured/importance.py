"""Folders of importance files: one checkpoint-like sub-folder per order, and a sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perta.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from perta.store.checkpoint import IMPORTANCE_SIDECAR
from perta.store.parse import fits, read_json

_FORM = dict.fromkeys(("model_fingerprint?", "data_fingerprint?", "reduction?"), (str, type(None)))


def order_name(order: float) -> str:
    """Name of the sub-folder that holds importance of one order, such as `order-1`."""
    return f"order-{order:g}"


def order_folder(folder: Path, order: float) -> Path:
    """Sub-folder of an importance folder that holds one order p; ConfigError if it has others."""
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"The importance folder {folder} does not exist. Make it with "
            f"`perta importance --order {order:g} --output {folder} ...`."
        )
    wanted = folder / order_name(order)
    if not wanted.is_dir():
        present = sorted(path.name.removeprefix("order-") for path in folder.glob("order-*"))
        raise ConfigError(
            f"{folder} has no importance of order {order:g}; it has "
            f"{', '.join(present) or 'none'}. Make it with "
            f"`perta importance --order {order:g} --output ...`, or choose a method or --order "
            "that fits."
        )
    return wanted


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Orders, reduction, counts, fingerprints, seed and versions of an importance folder."""
    file = folder / IMPORTANCE_SIDECAR
    if not file.is_file():
        raise CheckpointNotFoundError(
            f"{folder} is not an importance folder: it has no {IMPORTANCE_SIDECAR}. Make one "
            f"with `perta importance`."
        )
    sidecar = read_json(file, CorruptCheckpointError)
    if not fits(sidecar, _FORM):
        raise CorruptCheckpointError(f"{file} has entries of another kind than `perta` writes.")
    return sidecar
