"""Methods found by name, with settings as they are typed, and those of a program's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import yaml

from perta.errors import ConfigError, first_line, nearest
from perta.methods import (  # noqa: F401 - they define methods
    diagonal,
    directions,
    objectives,
    targets,
    task_vectors,
)
from perta.methods.method import KNOWN, Edit, Method
from perta.options import MethodText, WeightingConfig
from perta.progress import warn
from perta.store.own_code import run_file

_Kind = TypeVar("_Kind", bound=Method)


def known(kind: type[_Kind]) -> dict[str, type[_Kind]]:
    """Name -> class of every method of a kind."""
    _load_installed()
    return {name: cls for name, cls in KNOWN.items() if issubclass(cls, kind)}


def load_methods(path: Path) -> None:
    """Make the methods that a Python file defines known; all or, with a ConfigError, none."""
    before = dict(KNOWN)
    with _whole():
        run_file(path)
        if before == KNOWN:
            raise ConfigError(
                f"{path} defines no method: a class with a `name`, based on Weighting, Combination "
                "or Directions of perta.methods.method or on Training of perta.methods.objectives."
            )


@cache
def _load_installed() -> None:
    """Make the methods of installed packages known, which offer them as `perta.methods`."""
    for entry in entry_points(group="perta.methods"):
        try:
            with _whole():
                entry.load()
        except (Exception, SystemExit) as error:
            warn(f"The methods of {entry.value} are left out: {first_line(error)}")


@contextmanager
def _whole() -> Iterator[None]:
    """Forget the methods that were defined where a block fails."""
    before = dict(KNOWN)
    try:
        yield
    except BaseException:
        KNOWN.clear()
        KNOWN.update(before)
        raise


def parse(text: MethodText, kind: type[_Kind]) -> _Kind:
    """Read `NAME` or `NAME:key=value,key=value`, `_` is `-` in it; ConfigError if there is none."""
    name, values = split(str(text))
    method = find(name, kind)
    names = [item.name for item in method.options()]
    for key in values:
        if key not in names:
            raise unknown_setting(str(text), key, names)
    return method(**values)


def split(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a method as typed; neither is looked up."""
    name, _, rest = text.strip().partition(":")
    settings = {}
    for part in filter(str.strip, rest.split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"`{text}`: `{part}` is not of the form key=value.")
        settings[key.strip().replace("-", "_")] = _value(value)
    return name, settings


def find(name: str, kind: type[_Kind]) -> type[_Kind]:
    """Class of a method by name; a ConfigError names the nearest where there is none."""
    wanted = name.strip().lower().replace("_", "-")
    there = known(kind)
    if wanted not in there:
        raise ConfigError(f"Unknown method `{name}`.{nearest(wanted, there)}")
    return there[wanted]


def unknown_setting(text: str, key: str, names: Collection[str]) -> ConfigError:
    """The error for a setting that a method does not have."""
    having = _having(key)
    others = (
        f" `{'`, `'.join(having)}` {'has' if len(having) == 1 else 'have'} it." if having else ""
    )
    return ConfigError(
        f"`{text}`: unknown setting `{key}`.{others}"
        + (nearest(key, sorted(names)) if names else " The method has none.")
    )


def where_set(option: str) -> str:
    """Where to give what was taken for an option and is a setting of methods; else nothing."""
    key = option.lstrip("-").replace("-", "_")
    having = _having(key)
    if not having:
        return ""
    return f" It is a setting: --method NAME:{key}=VALUE, of `{'`, `'.join(sorted(having))}`."


def _having(key: str) -> list[str]:
    """Methods with a setting of this name."""
    return [name for name, cls in KNOWN.items() if key in (o.name for o in cls.options())]


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
        # YAML takes 3e-5, which has no point, for text.
        return float(value) if isinstance(value, str) else value
    except Exception:  # dates and numbers that are none raise what they like
        return text.strip()


# --- for edits ------------------------------------------------------------------------------------


def get_method(text: MethodText) -> Edit:
    """The method of an edit; see `parse`."""
    return parse(text, Edit)


def with_defaults(weighting: WeightingConfig) -> WeightingConfig:
    """The settings with the method's own where the user gave none."""
    method = get_method(weighting.method)
    alpha = weighting.scaling_coef
    return replace(
        weighting,
        method=str(method),
        scaling_coef=method.strength if alpha is None else alpha,
        # Patterns that say what to edit are not cut short by a default.
        layers=weighting.layers or ("all" if weighting.include else method.layers),
    )


def refuse_unused(weighting: WeightingConfig) -> None:
    """Stop at a granularity that the method does not look at."""
    method = get_method(weighting.method)
    if weighting.granularity != "element" and not method.needs.importance:
        having = ", ".join(
            f"`{name}`" for name, other in known(Edit).items() if other.needs.importance
        )
        raise ConfigError(f"`{method.name}` has no --granularity; {having} have.")


def at_strength(weighting: WeightingConfig, scaling_coef: float) -> WeightingConfig:
    """The settings at another strength α, what the method holds in proportion to it included."""
    method = get_method(weighting.method)
    configured = weighting.scaling_coef
    if not isinstance(configured, float | int) or configured == 0:
        configured = method.strength
    scaled = method.scaled(scaling_coef / configured)
    return replace(weighting, scaling_coef=scaling_coef, method=str(scaled))
