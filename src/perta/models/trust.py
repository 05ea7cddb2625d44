"""What a model's files may make the libraries do: read them, and nothing else.

Model code of a checkpoint (`auto_map` and *.py) is never run, and nobody is asked whether to;
kernels that a configuration names would be fetched and run as well, so they are refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta.errors import CheckpointError
from perta.store.parse import read_json

if TYPE_CHECKING:
    from torch import nn

LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Given to every call of `from_pretrained`; without the first, transformers asks standard input."""

NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # given to every call of `from_config`

_KERNELS = ("attn_implementation", "experts_implementation")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json, empty without one; CheckpointError if it names kernels to run."""
    file = folder / "config.json"
    config = read_json(file, CheckpointError, nan=True) if file.is_file() else {}
    for setting, value in settings_in(config):
        name = setting.rpartition(".")[2]
        if name.lstrip("_").removesuffix("_internal") in _KERNELS and "/" in str(value):
            raise CheckpointError(
                f"{file}: {name} names code outside the checkpoint ({value}), which is never "
                "run. Remove the entry; transformers then chooses one of its own."
            )
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint's config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def settings_in(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a configuration, and those of its parts as `part.name`."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from settings_in(value, f"{prefix}{name}.")


_PLAIN = re.compile(r"[\w.-]*")
_SECONDS = 2.0  # time for one pattern on all names of a model; it takes a thousandth of it


def without_patterns(config: Any, model: nn.Module, adapter: Path) -> None:
    """Put the names that an adapter's patterns match, soon enough, in their place in its config."""
    names = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if isinstance(pattern, str) and not _PLAIN.fullmatch(pattern):
            matched = _matched(pattern, names, adapter)
            setattr(config, field, "|".join(map(re.escape, matched)) or "(?!)")
    for field in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, field, None) or {}
        found: dict[str, Any] = {}
        for key, value in given.items():
            hits = [key] if _PLAIN.fullmatch(key) else _matched(rf"(.*\.)?({key})", names, adapter)
            for name in hits:
                found.setdefault(name if name == key else re.escape(name), value)
        if given:
            setattr(config, field, found)
    for field in ("layers_pattern", "modules_to_save"):
        given = getattr(config, field, None) or []
        for name in [given] if isinstance(given, str) else given:
            if not _PLAIN.fullmatch(str(name)):
                raise CheckpointError(f"{adapter}: {field} is {name!r}; it has to be a plain name.")


def _matched(pattern: str, names: Sequence[str], adapter: Path) -> list[str]:
    import regex

    try:
        chosen, end = regex.compile(pattern), time.monotonic() + _SECONDS
        return [
            name
            for name in names
            if chosen.fullmatch(name, timeout=max(0.001, end - time.monotonic()))
        ]
    except (TimeoutError, regex.error, RecursionError) as error:
        raise CheckpointError(
            f"{adapter}: the pattern {pattern!r} in adapter_config.json takes too long on the "
            f"model's names, or is none ({error}). List the names in its place."
        ) from error
