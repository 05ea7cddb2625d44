"""What the records of an edit's inputs say against using them together.

Importance and moments say at which model and on which rows they were measured, a tuned checkpoint
from which model and on which rows it was tuned. Inputs without a record are taken as stated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from perta.errors import CheckpointMismatchError
from perta.methods.method import Edit
from perta.models.formats.low_rank import Thin, ThinEntry, open_tuned, read_thin
from perta.progress import warn
from perta.store.checkpoint import TensorEntry, open_index, read_tensor
from perta.store.measured.importance import read_sidecar
from perta.store.measured.moments import open_moments
from perta.store.record import read_manifest

_SIDES = ("forget", "retain")


def check_records(
    method: Edit,
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, str],
    forget_rows: str | None = None,
) -> None:
    """Stop at inputs that their own records show to be the wrong ones, or tell of doubtful ones.

    Inputs are given by name, as folders and hashes of their content; `forget_rows` is the forget
    set's, where it is known. CheckpointMismatchError at importance of another model, a checkpoint
    that is not the base tuned on its set, or rows on both sides.
    """
    _check_models(method, folders, fingerprints)
    told = {*_measured_on("forget", folders), *_known([forget_rows])}
    _check_starts(method, folders, fingerprints, told)
    sides = {side: _rows_of(side, folders) for side in _SIDES}
    for rows in sides["forget"].keys() & sides["retain"].keys():
        forget, retain = sides["forget"][rows], sides["retain"][rows]
        raise CheckpointMismatchError(
            f"{forget} is given for the forget set and {retain} for the retain set, but their "
            "records say that both were made from the same rows. Are the two exchanged? Make the "
            "wrong one again from its own set."
        )
    whole = _tuning(folders["full"])
    if whole.get("base") == fingerprints["base"] and whole.get("data") in sides["retain"]:
        warn(
            f"{sides['retain'][whole['data']]} was measured on all rows that {folders['full']} was "
            "tuned on, so what is to be forgotten is protected as well. Measure the rows to keep "
            "alone."
        )


def tuned_on(folder: Path) -> str | None:
    """Fingerprint of the rows that a checkpoint was tuned on, if `perta finetune` recorded them."""
    return _tuning(folder).get("data")


def _check_models(
    method: Edit, folders: Mapping[str, Path], fingerprints: Mapping[str, str]
) -> None:
    wanted = ("full",) if method.needs.at == "full" else ("base", "full")
    for side in _SIDES:
        folder = folders.get(f"{side}_importance")
        if folder is None or not method.needs.importance:
            continue
        measured = read_sidecar(folder).get("model_fingerprint")
        if measured is not None and measured not in {fingerprints[name] for name in wanted}:
            models = " or ".join(str(folders[name]) for name in wanted)
            raise CheckpointMismatchError(
                f"{folder} holds importance of another model than {models}, where `{method.name}` "
                f"takes it. Make it again with `perta importance --checkpoint {folders[wanted[0]]} "
                "...`."
            )


def _check_starts(
    method: Edit,
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, str],
    forget_rows: set[str],
) -> None:
    """A task vector starts at the base; one from or to θ_full would hold all that was learnt."""
    whole, base, full = _tuning(folders["full"]), folders["base"], folders["full"]
    used = ["forget"] if method.direction == "forget - base" else []
    used += ["retain"] if method.needs.retain_checkpoint else []
    for name, folder in _tuned(folders):
        side = name.split()[0]
        start, rows = (_tuning(folder).get(key) for key in ("base", "data"))
        if start not in (None, fingerprints["base"]):
            other = full if start == fingerprints["full"] else f"another model than {base}"
            wrong = f"was tuned from {other}, but a {name} is tuned from the base"
        elif side not in used or (side == "forget" and rows in forget_rows):
            continue
        elif _is_the_same(folder, full, base):
            wrong = f"is {full} itself, which learned all rows, not those of one set"
        elif side == "forget" and rows and (start, rows) == (whole.get("base"), whole.get("data")):
            wrong = f"was tuned on all rows that {full} was tuned on; without them it is the base"
        else:
            continue
        raise CheckpointMismatchError(
            f"{folder} {wrong}. Make it again with `perta finetune --base {base} --data "
            f"{side.upper()}_SET ...`."
        )


def _is_the_same(tuned: Path, full: Path, base: Path) -> bool:
    """Whether a checkpoint holds θ_full, also in a wider type or as an adapter of the base."""
    start = open_index(base)
    theirs = open_tuned(tuned, start)

    def holds(name: str, entry: TensorEntry) -> bool:
        other = theirs.find(name)
        if other is None or other.shape != entry.shape:
            return False
        ours = read_tensor(entry)
        if not isinstance(other, ThinEntry):
            return torch.equal(ours, read_tensor(other).to(ours.dtype))
        thin, theta = read_thin(other), read_tensor(start.tensors[other.name]).double()
        away = (ours.double() - theta - thin.whole()).abs()
        # Who merged it multiplied in float32, with an error in each of the products that are added
        # up, however small their sum; and may have rounded to the stored type in between.
        terms = Thin(thin.left.abs(), thin.right.abs()).whole() + theta.abs()
        eps = torch.finfo(ours.dtype).eps + len(thin.right) * torch.finfo(torch.float32).eps
        return bool((away <= eps * terms).all())

    return all(holds(name, entry) for name, entry in open_index(full).tensors.items())


def _rows_of(side: str, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Fingerprint of every set of rows that a side was made from -> what was."""
    found: dict[str, Path] = {}
    for name, folder in _tuned(folders):
        if name.startswith(side) and (tuned := tuned_on(folder)):
            found[tuned] = folder
    return found | _measured_on(side, folders)


def _measured_on(side: str, folders: Mapping[str, Path]) -> dict[str, Path]:
    """The same for what was measured alone."""
    found: dict[str, Path] = {}
    if importance := folders.get(f"{side}_importance"):
        rows = read_sidecar(importance).get("data_fingerprint")
        found |= dict.fromkeys(_known([rows]), importance)
    if moments := folders.get(f"{side}_moments"):
        facts = open_moments(moments).facts
        found |= dict.fromkeys(_known(facts.get("data_fingerprints") or ()), moments)
    return found


def _known(fingerprints: Iterable[Any]) -> list[str]:
    return [value for value in fingerprints if isinstance(value, str)]


def _tuned(folders: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """The tuned checkpoints, each with its kind in words."""
    return [
        (f"{name.split('_')[0]} checkpoint", folder)
        for name, folder in folders.items()
        if name.startswith(("forget_checkpoint", "retain_checkpoint"))
    ]


def _tuning(folder: Path) -> Mapping[str, str]:
    """Base and rows that `perta finetune` recorded; nothing of any other checkpoint."""
    record = read_manifest(folder) or {}
    inputs = record.get("inputs")
    return inputs if record.get("stage") == "finetune" and isinstance(inputs, dict) else {}
