"""What a model's files may make the libraries do: read them, and nothing else.

Model code of a checkpoint (`auto_map` and *.py) is never run, and nobody is asked whether to;
kernels that a configuration names would be fetched and run as well, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perta.errors import CheckpointError
from perta.store.parse import read_json

LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Given to every call of `from_pretrained`; without the first, transformers asks standard input."""

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Given to every call of `from_config`."""

_KERNELS = ("attn_implementation", "experts_implementation")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or names kernels that would be fetched and run.
    """
    file = folder / "config.json"
    config = read_json(file, CheckpointError, nan=True) if file.is_file() else {}
    for name, value in _settings(config):
        if name.lstrip("_").removesuffix("_internal") in _KERNELS and "/" in str(value):
            raise CheckpointError(
                f"{file}: {name} names code outside the checkpoint ({value}), which is never "
                "run. Remove the entry; transformers then chooses one of its own."
            )
    return config


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)
