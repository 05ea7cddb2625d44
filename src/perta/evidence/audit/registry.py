"""The probes there are, and which of them a level or a name means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from perta.errors import ConfigError, nearest
from perta.evidence.audit.probe import Need, Probe
from perta.evidence.audit.probes import answers, collateral, inside, membership, verbatim, weights
from perta.evidence.audit.probes.frames import Frames
from perta.evidence.audit.probes.shadows import LikelihoodRatio
from perta.evidence.benchmark import own_class
from perta.evidence.settings import LEVELS, Level

PROBES: tuple[type[Probe], ...] = (
    verbatim.Fact,
    verbatim.FactToken,
    verbatim.Drawn,
    verbatim.Choice,
    verbatim.FirstChoice,
    verbatim.Answer,
    verbatim.Strength,
    verbatim.Memorised,
    verbatim.Overlap,
    membership.Loss,
    membership.Zlib,
    membership.MinK,
    membership.MinKPlusPlus,
    membership.Reference,
    LikelihoodRatio,
    answers.Whose,
    answers.DrawnPlainly,
    answers.DrawnSharply,
    Frames,
    weights.Rounding,
    weights.Relearned,
    inside.Lens,
    inside.Depth,
    collateral.Kept,
    collateral.Near,
    collateral.World,
    collateral.General,
    collateral.Repetition,
    collateral.Oddness,
    collateral.Refusals,
)
"""In the order in which they are told."""

_TEXTS = ("name", "group", "title", "question", "source")
SETS = ("forget", "retain", "holdout", "world", "general")
"""Options of an audit that name rows."""
_SWITCHES = ("wording", "by_row", "guessable", "thrifty", "shadowed")
_KINDS: dict[str, Any] = {
    **dict.fromkeys((*_TEXTS, "unit"), str),
    **dict.fromkeys(_SWITCHES, bool),
    **dict.fromkeys(("judge", "tokens"), Callable),
}
_NAMES = {"sets": SETS, "compared": SETS, "needs": get_args(Need)}


def choose_probes(level: Level, names: Sequence[str] = ()) -> list[Probe]:
    """The probes of a level, or those of names, groups and files; ConfigError if one is none."""
    if not names:
        return [probe() for probe in PROBES if probe.level in LEVELS[: LEVELS.index(level) + 1]]
    known = dict.fromkeys(key for probe in PROBES for key in (probe.name, probe.group))
    chosen: list[Probe] = []
    for name in names:
        if name.endswith(".py"):
            chosen.append(_load_probe(Path(name)))
        elif name in known:
            chosen += [probe() for probe in PROBES if name in (probe.name, probe.group)]
        else:
            raise ConfigError(f"--probe {name}: there is no such probe.{nearest(name, known)}")
    homes = {(probe.name, type(probe).__module__) for probe in chosen}
    for name, count in Counter(name for name, _ in homes).items():
        if count > 1:
            raise ConfigError(f"--probe: {count} files define a probe {name}. Name one otherwise.")
    return list({probe.name: probe for probe in chosen}.values())


def _load_probe(path: Path) -> Probe:
    """The probe that a Python file defines; a ConfigError as `own_class`, or a name of ours."""
    own: type[Probe] = own_class(path, Probe, _TEXTS)
    odd = [part for part, kind in _KINDS.items() if not isinstance(getattr(own, part), kind)]
    for part, known in _NAMES.items():
        names = getattr(own, part)
        if not (isinstance(names, tuple | list) and all(name in known for name in names)):
            odd.append(part)
    odd += [] if own.level in LEVELS else ["level"]
    if odd:
        raise ConfigError(
            f"{path}: {own.__name__} has {', '.join(odd)} of another form than those of "
            f"{Probe.__module__}.Probe."
        )
    if own.name in {probe.name for probe in PROBES}:
        raise ConfigError(f"{path}: there is a probe {own.name} already. Name it otherwise.")
    return own()
