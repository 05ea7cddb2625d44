"""The probes there are, and which of them a level or a name means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perta.errors import ConfigError, nearest
from perta.evidence.audit.probe import Probe
from perta.evidence.audit.probes import answers, collateral, inside, membership, verbatim, weights
from perta.evidence.audit.probes.frames import Frames
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
    collateral.Repetition,
    collateral.Oddness,
    collateral.Refusals,
)
"""In the order in which they are told."""


def choose_probes(level: Level, names: Sequence[str] = ()) -> list[Probe]:
    """The probes that run.

    Args:
        level: those of it and of lesser levels run, where no names are given.
        names: probes, groups of probes, or Python files that define one; they run at every level.

    Raises:
        ConfigError: there is no such probe, or the file defines none.
    """
    if not names:
        within = LEVELS[: LEVELS.index(level) + 1]
        return [probe() for probe in PROBES if probe.level in within]
    known = dict.fromkeys(key for probe in PROBES for key in (probe.name, probe.group))
    chosen: list[Probe] = []
    for name in names:
        if name.endswith(".py"):
            chosen.append(load_probe(Path(name)))
        elif name in known:
            chosen += [probe() for probe in PROBES if name in (probe.name, probe.group)]
        else:
            raise ConfigError(f"--probe {name}: there is no such probe.{nearest(name, known)}")
    return list({probe.name: probe for probe in chosen}.values())


def load_probe(path: Path) -> Probe:
    """The probe that a Python file defines; a ConfigError as `own_class`, or a name of ours."""
    own: type[Probe] = own_class(path, Probe, ("name", "group", "title", "question", "source"))
    if own.name in {probe.name for probe in PROBES}:
        raise ConfigError(f"{path}: there is a probe {own.name} already. Name it otherwise.")
    return own()
