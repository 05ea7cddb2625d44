"""Code of a user's own: run as a module, and known by its hash."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from perta.errors import ConfigError, first_line
from perta.parallel import everywhere


def is_ours(cls: type[Any]) -> bool:
    """Whether a class comes with this package, whose version records name."""
    return cls.__module__.startswith("perta.")


def code_of(cls: type[Any]) -> str | None:
    """SHA-256 of the file that defines a class; None where it has none."""
    loaded: str | None = getattr(sys.modules.get(cls.__module__), "loaded_from", None)
    try:
        return loaded or hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def run_file(path: Path) -> ModuleType:
    """Run a user's own Python file as a module; `loaded_from` in it is the SHA-256 of the code."""
    return everywhere(_run_file, path)  # what is sent to other processes may be of its classes


def _run_file(path: Path) -> ModuleType:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"There is no Python file {path} to run: {error.strerror}.") from error
    digest = hashlib.sha256(code).hexdigest()
    module = ModuleType(f"own_{digest[:16]}")
    vars(module).update(__file__=str(path), loaded_from=digest)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(code, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{path} cannot be run: {what}") from error
    return module
