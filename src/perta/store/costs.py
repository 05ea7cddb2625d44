"""What an unlearned model took, in seconds and operations: every stage, from the records.

One function for the terminal, the page and its tables. A stage's own record tells what it took
when it was made, so a run that reuses stages costs no less than the one that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perta.store.provenance import FORGET_CHECKPOINT, Record, Records

STAGES: Mapping[str, str] = {
    "given": "losses of the given forget checkpoint",
    "finetune": "tuning on the forget set",
    "retain_finetune": "tuning on the retain set",
    "forget_importance": "importance, forget set",
    "retain_importance": "importance, retain set",
    "forget_moments": "moments, forget set",
    "retain_moments": "moments, retain set",
    "general_moments": "moments, general text",
    "forget_fact_moments": "moments, facts of the forget set as they are repeated",
    "merge_moments": "merging moments",
    "rounds": "further rounds of tuning",
    "direction": "direction",
    "calibrate": "what unseen means",
    "strength": "search of the strength",
    "train": "training",
    "edit": "edit",
}
"""Stage, as records name it -> what it is, in the order in which stages run."""
_FACTS, _BY = "forget_fact_moments", "facts_by"  # stage, and its input that other moments lack
_OTHERS = {
    "base": "tuning of a tiny base model",
    "full": "tuning on all rows",
    "retrained": "tuning without the forget set",
    "evaluate_before": "evaluation of the full model",
    "evaluate_after": "evaluation of the result",
    "evaluate_base": "evaluation of the base model",
}
FORWARD, BACKWARD = 1, 2  # operations of a pass over one token
_OF_INPUT = {FORGET_CHECKPOINT: "finetune", "retain_checkpoint": "retain_finetune"}
_EVALUATION = "evaluate"


@dataclass(frozen=True)
class Costs:
    """What one unlearned model took."""

    stages: Mapping[str, float]  # what each stage is -> seconds, in order
    evaluation: float  # seconds of evaluating it and what it is compared with; in no sum
    # What each stage is -> operations in forward passes over one token, each of them two a
    # parameter. What no token goes through, such as the solve and the edit, has none.
    passes: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of all stages together, evaluation left out."""
        return sum(self.stages.values())

    @property
    def operations(self) -> float:
        """Forward passes over one token of all stages together."""
        return sum(self.passes.values())


@dataclass(frozen=True)
class Step:
    """One step of a run, as records name it; `operations` is 0 where its result is there."""

    name: str
    title: str
    operations: float
    reused: bool


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    steps: tuple[Step, ...] = field(repr=False)
    memory: float  # bytes, about, at the most demanding step, activations left out
    work: float  # bytes that the work folder takes in the end, about
    output: float  # bytes of the output
    work_folder: Path  # where intermediate results would lie
    output_folder: Path  # where the output would lie

    @property
    def operations(self) -> float:
        """About how many all steps take."""
        return sum(step.operations for step in self.steps)


def costs_of(record: Record, records: Records, evaluation: Record | None = None) -> Costs:
    """Everything that making an output took, by its record, its inputs' and its evaluation's."""
    noted: Mapping[str, float] = record.get("unlearn", {}).get("seconds", {})
    apart = [s for name, s in noted.items() if name.startswith(_EVALUATION)]
    return Costs(
        _by_title("seconds", seconds_of, record, records),
        sum(apart) or seconds_of(evaluation or {}),
        _by_title("passes", passes_of, record, records),
    )


def title_of(name: str) -> str:
    """What a stage is, by the name under which a run notes it."""
    stage = _stage(name)
    number = f" ({name.removeprefix(stage + '_')})" if stage != name else ""
    kind, _, of = name.partition("_")
    other = f"evaluation of {of}" if kind == "evaluate" else name.replace("_", " ")
    return {**STAGES, **_OTHERS}.get(stage, other) + number


def seconds_of(record: Record) -> float:
    """What a stage took when it was made."""
    return float(sum(record.get("seconds", {}).values()))


def passes_of(record: Record) -> float:
    """Operations of a finished stage, or of several, in forward passes over one token."""
    noted = record.get("passes")
    if isinstance(noted, Mapping):
        return float(sum(noted.values()))
    return float(noted or (FORWARD + BACKWARD) * record.get("tokens", 0))


def _by_title(
    what: str, of: Callable[[Record], float], record: Record, records: Records
) -> dict[str, float]:
    """Title of each stage -> its sum; of `seconds` or `passes`, and one record's by `of`."""
    # What a run noted of a stage comes first: in a shared work folder it may have been made again.
    found = {
        **dict(_recorded(what, of, record, records)),
        **record.get("unlearn", {}).get(what, {}),
    }
    return {
        title: sum(taken)
        for stage, title in STAGES.items()
        if (taken := [s for name, s in found.items() if _stage(name) == stage])
    }


def duration(seconds: float) -> str:
    """A duration in the unit that reads best."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes in the unit that reads best."""
    return _in_units(count, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{count:.0f} bytes"


def operations(count: float) -> str:
    """A number of floating-point operations in the unit that reads best."""
    found = _in_units(count, {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9})
    return found or f"{count / 1e6:.1f} MFLOP"


def _in_units(count: float, units: Mapping[str, float]) -> str | None:
    return next((f"{count / least:.1f} {u}" for u, least in units.items() if count >= least), None)


def percent(share: float) -> str:
    """A share of which the small ones tell."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def details(stages: Mapping[str, float]) -> str:
    """All stages in one line."""
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items())


def _recorded(
    what: str, of: Callable[[Record], float], record: Record, records: Records
) -> Iterator[tuple[str, float]]:
    """Stage and what it took, by the records of an output and of its inputs."""
    own = record.get(what, {})
    for stage, taken in own.items() if isinstance(own, Mapping) else ():
        yield stage, float(taken)
    general = record.get("unlearn", {}).get("inputs", {}).get("general")
    for name, fingerprint in record.get("inputs", {}).items():
        made = records.get(str(fingerprint), {})
        if name.endswith("_moments"):
            yield from _of_moments(of, name, made, records, general)
        elif made and name not in ("full", "base"):
            # As a run notes the stage that made it: `forget_checkpoint_2` is `finetune_2`.
            part = next((part for part in _OF_INPUT if name.startswith(part)), "")
            yield _OF_INPUT.get(part, "") + name.removeprefix(part), of(made)


def _of_moments(
    of: Callable[[Record], float], name: str, made: Record, records: Records, general: str | None
) -> Iterator[tuple[str, float]]:
    """Moments of one set; merged ones were made of others."""
    parts = [fp for part, fp in made.get("inputs", {}).items() if part.startswith("moments_")]
    if not parts:
        inputs = made.get("inputs", {})
        is_general = general is not None and inputs.get("data") == general
        if made:
            yield "general_moments" if is_general else _FACTS if _BY in inputs else name, of(made)
        return
    yield "merge_moments", of(made)
    sums: dict[str, float] = {}
    for fingerprint in parts:
        for stage, seconds in _of_moments(
            of, name, records.get(str(fingerprint), {}), records, general
        ):
            sums[stage] = sums.get(stage, 0.0) + seconds
    yield from sums.items()


def _stage(name: str) -> str:
    """The stage that a name stands for; tunings with further seeds are numbered."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else name
