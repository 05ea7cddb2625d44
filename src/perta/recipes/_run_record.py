"""What a whole run was made from, beside the record of its last stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta.data.examples import ExampleSet
from perta.errors import CheckpointError
from perta.methods.method import Method
from perta.methods.registry import parse
from perta.models.load import picked
from perta.recipes.settings import WORK, UnlearnConfig
from perta.stages.stage import changed_or_older, exists_error, other_origin
from perta.store.atomic import recover
from perta.store.fingerprint import fingerprint, is_as_written
from perta.store.provenance import FORGET_CHECKPOINT
from perta.store.record import (
    MANIFEST,
    make_manifest,
    read_manifest,
    settings_of,
    stage_key,
    write_manifest,
)

STRENGTH = "strength.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run as a whole was made from, kept in the output's manifest under `unlearn`.

    It lets a run with an output that does not match stop before the first long step, and one whose
    output matches skip them all, even when the work folder is gone. `passes` are operations of
    stages without an output of their own, in forward passes over one token.
    """

    config: UnlearnConfig
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    folders: Mapping[str, Path]
    held_back: Mapping[str, Any]
    seconds: dict[str, float]
    passes: dict[str, float]

    @classmethod
    def of(
        cls,
        config: UnlearnConfig,
        base: Path,
        full: Path,
        tuned: Mapping[str, Path],
        sets: Mapping[str, ExampleSet],
        held_back: Mapping[str, Any],
    ) -> RunRecord:
        """The record of a run that is about to begin; `tuned` are checkpoints that were given."""
        named = ["forget", "retain", "general"]
        if config.weighting.scaling_coef == "auto":
            named.append("holdout")
        folders = {"base": base, "full": full, **tuned}
        if config.retain_moments is not None:
            folders["retain_moments"] = config.retain_moments
        inputs = {name: fingerprint(folder) for name, folder in folders.items()}
        inputs |= {name: sets[name].fingerprint for name in named if name in sets}
        return cls(config, _resolved(config, base), inputs, folders, held_back, {}, {})

    @property
    def key(self) -> str:
        """Hash of all that decides the run's result."""
        return stage_key("unlearn", self.settings, self.inputs)

    def is_finished(self) -> bool:
        """Whether the output is there, as this run would make it."""
        for place in (self.config.output, self.config.output / MANIFEST):
            recover(place)
        manifest = read_manifest(self.config.output) or {}
        is_mine = manifest.get("unlearn", {}).get("key") == self.key
        return is_mine and is_as_written(self.config.output)

    def refuse_foreign(self) -> None:
        """Stop before an output of another origin that must not be replaced."""
        output = self.config.output
        if self.config.overwrite or not output.exists():
            return
        manifest = read_manifest(output)
        if manifest and manifest.get("part_of") == self.key:
            return  # this very run was killed before it wrote its record
        made = (manifest or {}).get("unlearn")
        why = other_origin(manifest, made, self.settings, self.inputs)
        raise exists_error(output, why or changed_or_older(made or {}, self.key))

    def check(self, made: Iterable[Path]) -> None:
        """Stop where an input is not what this run began with, or a stage read something else."""
        protected = self.held_back.get("protected")
        known = {name: {value, protected} for name, value in self.inputs.items()}
        rows = {self.inputs.get(name) for name in ("forget", "retain", "general")} | {protected}
        known |= {"data": rows, "checkpoint": {self.inputs["base"], self.inputs["full"]}}
        for name in (FORGET_CHECKPOINT, "retain_moments"):
            known.pop(
                name, None
            )  # rounds, rows to take out: the run makes its own from a given one
        found = {name: fingerprint(folder) for name, folder in self.folders.items()}
        changed = {name for name, value in found.items() if value != self.inputs[name]}
        for output in made:
            read = (read_manifest(output) or {}).get("inputs", {})
            changed |= {n for n, value in read.items() if value not in known.get(n, {value})}
        if changed:
            raise CheckpointError(
                f"{', '.join(sorted(changed))} changed while the run read it, so no record of the "
                "run would be true. Make sure that nothing writes to the inputs, and run again."
            )

    def write(self, evaluation: Mapping[str, Any], **found: Any) -> None:
        """Put the record into the output's, with results; what the run wrote before stays."""
        manifest = read_manifest(self.config.output) or {}
        manifest.pop("part_of", None)
        # Of another run the edit may be the same, and what it found is none of this one's.
        earlier = manifest.get("unlearn", {})
        earlier = earlier if earlier.get("key") == self.key else {}
        manifest["unlearn"] = make_manifest(
            "unlearn",
            self.settings,
            self.inputs,
            seconds={**earlier.get("seconds", {}), **self.seconds},
            passes={**earlier.get("passes", {}), **self.passes},
            sources={name: getattr(self.config, name) for name in self.inputs},
            evaluation=evaluation or earlier.get("evaluation", {}),
            **({"held_back": dict(self.held_back)} if self.held_back else {}),
            **{name: earlier[name] for name in ("strength", FORGET_CHECKPOINT) if name in earlier},
            **found,
        )
        write_manifest(self.config.output, manifest)


def other_work_folders(config: UnlearnConfig) -> list[Path]:
    """Those beside the output and this run's own, and those that records beside the output name."""
    own = config.work_folder
    found = {p for place in (config.output, own) for p in place.parent.glob(f"*{WORK}")}
    for record in config.output.parent.glob(f"*/{MANIFEST}"):
        run = (read_manifest(record.parent) or {}).get("unlearn", {})
        found.add(Path(run.get("settings", {}).get("work_dir", own)))
    places = {folder.resolve(): folder for folder in found if folder.is_dir()}
    return sorted(folder for place, folder in places.items() if place != own.resolve())


def _resolved(config: UnlearnConfig, base: Path) -> dict[str, Any]:
    # How the result is evaluated does not decide what it is; how it is chosen does.
    evaluation = {"evaluate", "fail_unless", *settings_of(config.scoring)}
    if config.weighting.scaling_coef != "auto":
        evaluation |= {"holdout", "retain_budget"}
    settings = {k: v for k, v in settings_of(config).items() if k not in evaluation}
    return {
        **settings,
        **picked(config.compute, base),
        **parse(config.weighting.method, Method).record(),
        "work_dir": str(config.work_folder),
    }
