"""What made an output: settings, inputs by fingerprint, versions, timings.

Every output carries such a record: folders in `perta.json`, result files under the key
`perta`. Its `key` is a hash of the stage, the settings that can change the result and the
content of every input, so a finished stage is reused exactly when nothing it depends on has
changed and its files are still those it wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from perta.errors import ConfigError, CorruptCheckpointError, DataError, OutputExistsError
from perta.options import at_home, option_name, require
from perta.store.atomic import check_place, write_text
from perta.store.parse import NUMBERS, fits, read_json
from perta.version import __version__

MANIFEST = "perta.json"
ADAPTER_CONFIG = "adapter_config.json"  # how a LoRA adapter is scaled, and what it belongs to

# They decide where and how fast a result appears, not what it is.
NOT_IN_KEY = {
    "output",
    "overwrite",
    "work_dir",
    "threads",
    "pass_batch_size",
    "edit_threads",
    "show_samples",
    "direction",
    "solve_device",
    "save_every",
    "accumulate_on",
    "moment_memory",
    "shard",
}


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as plain values, nested classes flattened as on the command line."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat.update(settings_of(value))
        else:
            flat[option_name(config, item.name)] = str(value) if isinstance(value, Path) else value
    return flat


def stage_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256, in hexadecimal, of what decides a stage's result: settings, and inputs' content.

    ConfigError at a whole number that no record could hold, and no library takes.
    """
    for name, value in settings.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            is_held = not isinstance(one, int) or abs(one) < 1 << 63
            require(is_held, name.replace("_", "-"), one, "of fewer digits (below 2^63)")
    deciding = {k: v for k, v in settings.items() if k not in NOT_IN_KEY and k not in inputs}
    record = {"stage": stage, "settings": deciding, "inputs": inputs, "version": __version__}
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def make_manifest(
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    seconds: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The record of one finished stage as plain values, `more` results worth keeping among them."""
    return {
        "stage": stage,
        "key": stage_key(stage, settings, inputs),
        "settings": {k: v for k, v in settings.items() if k != "overwrite"},
        "inputs": dict(inputs),
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": {k: round(v, 3) for k, v in (seconds or {}).items()},
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    names = ("torch", "transformers", "safetensors")
    return {
        "perta": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


@cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The record of an output folder or results file; None if it has none."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        record: Any = read_json(file, DataError, nan=True)
    except DataError:
        return None
    if path.is_file():
        record = record.get("perta")
    return record if is_record(record) else None


_TENSOR = {
    **{"name": str, "elements": NUMBERS, "delta_norm": NUMBERS},
    **dict.fromkeys(("mean_weighting?", "task_vector_norm?"), (type(None), *NUMBERS)),
}
_FORM = {
    **dict.fromkeys(("stage?", "key?", "content?"), str),
    **{key: {str: object} for key in ("settings?", "evaluation?")},
    "edit?": {"tensors?": [_TENSOR]},
    "earlier_full?": [str],
    "examples?": (type(None), *NUMBERS),
    "rounds?": [{"comes_back?": (type(None), *NUMBERS)}],
    "versions?": {str: object},
    "inputs?": {str: str},
    "seconds?": {str: NUMBERS},
    "passes?": (dict, *NUMBERS),
}


def is_record(value: Any) -> bool:
    """Whether a value has the form of a record, so that its parts can be read without a look."""
    return fits(value, _FORM) and ("unlearn" not in value or is_record(value["unlearn"]))


def content_of_results(results: Mapping[str, Any]) -> str:
    """Hash of what a results file holds besides its record."""
    values = {name: value for name, value in results.items() if name != "perta"}
    as_read = json.loads(json.dumps(values, default=str))  # keys are texts there, say
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def aggregates(results: Mapping[str, Any]) -> dict[str, Any]:
    """Metric -> aggregate value of a results file, which holds its record and other values too."""
    return {
        name: value["agg_value"]
        for name, value in results.items()
        if isinstance(value, Mapping) and "agg_value" in value
    }


def refuse_changed(results: Mapping[str, Any], where: str | Path) -> None:
    """Stop with a DataError at results that are not those that their own record, if any, is of."""
    record = results.get("perta")
    content = record.get("content") if isinstance(record, dict) else None
    if content is not None and content != content_of_results(results):
        raise DataError(f"{where} is not as perta wrote it: values changed since. Make it again.")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's record in one step, so that no half of it is ever read."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


# --- what an output may be put in place of: one rule for every command -------------------------


def check_output(
    output: Path,
    reads: Iterable[str | Path] = (),
    *,
    overwrite: bool,
    within: bool = False,
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Stop before an output that must not be written, or not replace what is there.

    With `overwrite` an output replaces regular files and folders that this package wrote, which
    their records, or `ours`, say, and empty ones; anything else is an OutputExistsError. It never
    replaces what is read (ConfigError), in which it may lie `within`, as files may.
    """
    check_separate(output, reads, within=within)
    check_place(output)
    if overwrite and output.exists() and not (ours or _made_here)(output):
        raise OutputExistsError(
            f"{output} exists and was not made by perta, so it is never replaced. Choose another "
            "--output, or move it away yourself."
        )


def _made_here(output: Path) -> bool:
    """Whether a file or folder is empty, or has a record of this package in it."""
    if output.is_dir():
        return read_manifest(output) is not None or not any(output.iterdir())
    return output.stat().st_size == 0 or read_manifest(output) is not None


def check_separate(output: Path, reads: Iterable[str | Path], *, within: bool = False) -> None:
    """Stop with a ConfigError where an output is, holds, or not `within` lies in, what is read."""
    place = output.resolve()
    for given in (place for named in reads for place in _read_from(at_home(named))):
        other = given.resolve()
        inside = place != other and place.is_relative_to(other)
        if (inside and not within) or other.is_relative_to(place):
            raise ConfigError(
                f"The output {output} overlaps the input {given}, which must stay as it is. "
                "Give an output of its own."
            )


def _read_from(given: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """What is given, and the models that it adapts, one above the other."""
    yield given
    file = given / ADAPTER_CONFIG
    if given in above or not given.is_dir() or not file.is_file():
        return
    base = read_json(file, CorruptCheckpointError, nan=True).get("base_model_name_or_path")
    if isinstance(base, str) and (place := at_home(base)).exists():
        yield from _read_from(place, (*above, given))
