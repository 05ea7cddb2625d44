"""Which method, with which settings: `perta-input:rho=100,tokens=answer`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from perta.errors import ConfigError
from perta.methods.method import Edit, Method
from perta.methods.objectives import Influence, Training
from perta.methods.registry import (
    find,
    get_method,
    refuse_unused,
    split,
    unknown_setting,
    with_defaults,
)
from perta.options import MomentOptions, Tokens, TrainSettings, WeightingConfig

_At = Literal["base", "full"]

_EDIT = ("granularity", "weighting_seed", "layers", "include", "exclude")
_MEASURING = ("tokens", "at", "share", "general", "forget_seeds")
_TRAINING = {item.name for item in dataclasses.fields(TrainSettings)} - {
    # The model in memory stays the one it is.
    *("lora_rank", "lora_alpha", "lora_targets", "seed")
}


@dataclass(frozen=True)
class _Spec:
    """One contender."""

    name: str

    @property
    def slug(self) -> str:
        """Its name as part of a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class EditSpec(_Spec):
    """A weight-space method."""

    weighting: WeightingConfig  # defaults filled in; the strength is the harness's to choose
    tokens: Tokens = MomentOptions.tokens  # that count in the moments
    at: _At | None = None  # where importance and moments are measured; None for the method's own
    share: float = 1.0  # of the protected retain rows that they are taken of
    general: bool = False  # whether moments of general text are added to the retain rows'
    forget_seeds: int = 0  # forget checkpoints; 0 for as many as the method needs

    @property
    def method(self) -> Edit:
        """The method with its settings."""
        return get_method(self.weighting.method)


@dataclass(frozen=True)
class TrainingSpec(_Spec):
    """A training method; the harness chooses learning rate and number of epochs."""

    method: Training
    training: TrainSettings


@dataclass(frozen=True)
class GivenSpec(_Spec):
    """A model that other code made; `{seed}` in its place stands for the seed."""

    place: str

    def at(self, seed: int) -> str:
        """The checkpoint of a seed."""
        return self.place.replace("{seed}", str(seed))


def parse_checkpoint(text: str, seeds: int) -> GivenSpec:
    """Read NAME=PATH from the command line; with several seeds each needs a path of its own."""
    name, _, place = (part.strip() for part in text.partition("="))
    if not GivenSpec(name, place).slug or not place:
        raise ConfigError(f"--checkpoint {text} is not of the form NAME=PATH.")
    if seeds > 1 and "{seed}" not in place:
        raise ConfigError(
            f"--checkpoint {text} is one model, but each of the {seeds} seeds has models of its "
            "own. Put {seed} into the path, or give one --seeds."
        )
    return GivenSpec(name, place)


def parse_spec(text: str, batch_size: int) -> EditSpec | TrainingSpec:
    """Read a contender from the command line: `NAME`, or `NAME:key=value,key=value`.

    Settings are those of the weighting and `tokens`, `at`, `share`, `general` and `forget_seeds`,
    or those of training, where `batch_size` stands for the published 32, which are more than a
    small forget set holds.
    """
    text = text.strip()
    name, settings = split(text)
    try:
        if issubclass(cls := find(name, Method), Training):
            settings = {key.removeprefix("unlearn_"): value for key, value in settings.items()}
            return _training_spec(text, cls, settings, batch_size)
        return _edit_spec(text, name, settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{text}`: {error}") from error


def _training_spec(
    text: str, cls: type[Training], settings: Mapping[str, Any], batch_size: int
) -> TrainingSpec:
    own = {item.name for item in cls.options()}
    for key in settings.keys() - own - _TRAINING:
        raise unknown_setting(text, key, own | _TRAINING)
    if cls.start == "base" or issubclass(cls, Influence):
        raise ConfigError(
            f"`{cls.name}` cannot be compared: it does not train from the full model step by step."
        )
    loop: dict[str, Any] = {"batch_size": batch_size, "accumulation": 1}
    loop |= {key: value for key, value in settings.items() if key not in own}
    method = cls(**{key: value for key, value in settings.items() if key in own})
    return TrainingSpec(text, method, TrainSettings(**loop))


def _edit_spec(text: str, name: str, settings: Mapping[str, Any]) -> EditSpec:
    own = {key: value for key, value in settings.items() if key not in (*_EDIT, *_MEASURING)}
    cls = find(name, Edit)
    for key in own.keys() - {item.name for item in cls.options()}:
        raise unknown_setting(text, key, [*(o.name for o in cls.options()), *_EDIT, *_MEASURING])
    method: Edit = cls(**own)
    edit = {key: value for key, value in settings.items() if key in _EDIT}
    for key in ("include", "exclude"):
        if key in edit:
            edit[key] = tuple(str(edit[key]).split("|"))
    given = WeightingConfig(method=str(method), **edit)
    refuse_unused(given)
    method.check_place(at := settings.get("at"))
    tokens, general = settings.get("tokens", MomentOptions.tokens), settings.get("general", False)
    share, seeds = float(settings.get("share", 1.0)), int(settings.get("forget_seeds", 0))
    adds = general is True
    is_share = 0 <= share <= 1 and (share > 0 or adds)
    for key, value, fits, wanted in (
        ("tokens", tokens, tokens in get_args(Tokens), "all or answer"),
        ("at", at, at in get_args(_At), "base or full"),
        ("general", general, isinstance(general, bool), "true or false"),
        ("forget_seeds", seeds, seeds >= 1, "at least 1"),
        ("share", f"{share:g}", is_share, "in (0, 1], or 0 with general=true"),
    ):
        if key in settings and not fits:
            raise ConfigError(f"`{text}`: {key} is {value}; it must be {wanted}.")
    if adds and not method.needs.moments:
        raise ConfigError(f"`{text}`: general adds moments, and `{name}` uses none.")
    return EditSpec(text, with_defaults(given), tokens, at, share, adds, seeds)
