"""The plan of an edit: which bytes of which files belong together.

    headers of every input ── compare names, shapes, types ── stop here if anything is wrong
      └ one `Target` for every tensor of θ_full: what it is computed from, or that it is copied

Only headers are read, apart from the copies of tied weights, which are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from perta.errors import CheckpointMismatchError, ConfigError, CorruptCheckpointError, some
from perta.methods.method import Edit, Side
from perta.models.complete import refuse_quantised
from perta.models.formats.low_rank import open_direction, open_tuned
from perta.models.layers import mlp_names
from perta.models.trust import read_config
from perta.options import WeightingConfig
from perta.progress import say
from perta.store.checkpoint import (
    HEADS,
    CheckpointIndex,
    TensorEntry,
    is_constant,
    matches,
    name_ends_with,
    open_index,
    opened,
    read_into,
)
from perta.store.measured.importance import order_folder, read_sidecar
from perta.store.measured.moments import MomentFolder

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_FEW = 8  # tensors that may differ between models of one kind, such as a head or a stored buffer
_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")

FULL, BASE = "full checkpoint", "base checkpoint"
FORGET, RETAIN = "forget checkpoint", "retain checkpoint"
FORGET_IMPORTANCE, RETAIN_IMPORTANCE = "forget importance", "retain importance"
DIRECTION = "weighted direction"
IMPORTANCE_ROLES: dict[Side, str] = {"forget": FORGET_IMPORTANCE, "retain": RETAIN_IMPORTANCE}


@dataclass(frozen=True)
class EditInputs:
    """Local folders that an edit reads."""

    full: Path  # θ_full, the checkpoint to clean
    base: Path  # θ₀
    # θ_f, one or several; none where the method subtracts something else.
    forget_checkpoints: tuple[Path, ...] = ()
    # Importance folder of the forget set, where the method needs it.
    forget_importance: Path | None = None
    # Importance folder of the retain set, where the method needs it.
    retain_importance: Path | None = None
    direction: Path | None = None  # weighted direction, for the structured methods
    retain_checkpoint: Path | None = None  # θ_r, for the method that adds a retain vector
    # θ_full before it was rounded to its type, where the method subtracts θ_full − θ₀.
    exact: Path | None = None


def forget_role(place: int) -> str:
    """Role of one of several forget checkpoints, counted from 0."""
    return FORGET if place == 0 else f"{FORGET} {place + 1}"


@dataclass(frozen=True)
class Target:
    """One tensor of the output."""

    full: TensorEntry  # its place in θ_full, and so in the output
    # Role -> tensor to read for the edit; empty if the tensor is copied.
    sources: Mapping[str, TensorEntry]
    # For the second stored copy of a tied parameter, the first one's name.
    alias_of: str | None = None


def plan_edit(
    full: CheckpointIndex, sources: Mapping[str, CheckpointIndex], weighting: WeightingConfig
) -> list[Target]:
    """Decide for every tensor of θ_full, in the order of its files, what it is computed from.

    `sources` has base, forget checkpoint and importance files by role; of the settings the include
    and exclude patterns and the layers count. CheckpointMismatchError where an input lacks a
    tensor, has one too many or of another shape; CheckpointError where it is quantised; ConfigError
    where a pattern matches nothing, or nothing is left to edit.
    """
    for index in (full, *sources.values()):
        refuse_quantised(index)
    others = (DIRECTION, *IMPORTANCE_ROLES.values())
    tied = _is_tied(full, [full, *(sources[role] for role in sources if role not in others)])
    # A tied parameter that θ_full stores twice has two names; `own` is the first stored.
    own: dict[str, str] = {}
    names = {name: own.setdefault(_key(name, tied), name) for name in full.tensors}
    selected = _select(full, names, weighting)
    if DIRECTION not in sources and weighting.layers == "mlp":
        selected = _in_mlps(full, selected)
    if DIRECTION in sources:
        # It was computed from the others, and holds only what is to change.
        sources = {DIRECTION: sources[DIRECTION]}
        found = {name for name in selected if sources[DIRECTION].find(name)}
        if not found:
            raise _no_linear(selected)
        selected = found
    selected -= _untrained(sources, selected, tied)
    aligned = {
        role: _align(full, index, role, selected, tied, weighting)
        for role, index in sources.items()
    }
    targets = []
    for name, entry in full.tensors.items():
        first = names[name]
        entries = (
            {role: theirs[first] for role, theirs in aligned.items()} if first in selected else {}
        )
        targets.append(Target(entry, entries, first if first != name else None))
    return targets


@dataclass(frozen=True)
class Layers:
    """What a structured method edits, by the names that the moments have."""

    chosen: tuple[str, ...]  # layers to edit
    # Wanted, but left as they are: nothing says what the retain set needs of them.
    unmeasured: tuple[str, ...]
    unknown: tuple[str, ...]  # the same, because the moments are of linear layers alone
    # Unmeasured too, but edited, because a pattern of --include asks for such alone.
    named: tuple[str, ...]


def choose_layers(
    full: CheckpointIndex, moments: MomentFolder, weighting: WeightingConfig
) -> Layers:
    """Decide which layers a structured method edits, by its settings and the retain set's moments.

    No moment, or a moment of no token, is no leave to subtract the task vector whole. ConfigError
    where nothing is left to edit.
    """
    of_mlps = _mlp(full) if weighting.layers == "mlp" else None
    names = {entry.name: name for name in moments.facts["inputs"] if (entry := full.find(name))}
    measured = {stored for stored, name in names.items() if moments.is_measured(name)}
    wanted = [
        stored
        for stored in dict.fromkeys([*names, *sorted(of_mlps or ())])
        if _is_wanted(stored, weighting) and (of_mlps is None or stored in of_mlps)
    ]
    without = [stored for stored in wanted if stored in names and stored not in measured]
    named = [stored for stored in without if _is_named(stored, names, measured, weighting)]
    layers = Layers(
        tuple(names[stored] for stored in wanted if stored in measured or stored in named),
        tuple(stored for stored in without if stored not in named),
        tuple(stored for stored in wanted if stored not in names),
        tuple(named),
    )
    if not layers.chosen:
        raise _no_layer(full, moments, layers, weighting)
    return layers


def _is_named(
    stored: str, names: Iterable[str], measured: set[str], weighting: WeightingConfig
) -> bool:
    """Whether a pattern of --include asks for a layer, and for none that was measured."""
    return any(
        matches(stored, [pattern])
        and not any(matches(other, [pattern]) for other in names if other in measured)
        for pattern in weighting.include
    )


def mlps_are_known(full: Path) -> bool:
    """Whether the MLP layers of θ_full can be told from the structure of its model."""
    return _mlp(open_index(full)) is not None


def _mlp(full: CheckpointIndex) -> set[str] | None:
    """Names of θ_full's MLP weights; None where they cannot be told from the model's structure."""
    return {entry.name for name in mlp_names(full.folder) if (entry := full.find(name))} or None


def describe_layers(layers: Layers) -> list[str]:
    """What a user must know of the choice of layers, one line each."""
    lines = []
    if layers.unmeasured:
        lines.append(
            f"{some(layers.unmeasured)} stay as they are: no token of the retain set was seen in "
            "them, or the model uses their weights without calling the layer, so nothing says what "
            "must be kept. To subtract their task vector whole, name them alone: --include "
            f"'{layers.unmeasured[0]}'."
        )
    if layers.unknown:
        lines.append(
            f"{some(layers.unknown)} stay as they are: they are of no linear layer whose inputs "
            "can be measured. A method without moments edits them."
        )
    if layers.named:
        lines.append(
            f"{some(layers.named)} are edited without protection, as --include asks: nothing was "
            "measured of them."
        )
    return lines


def _no_layer(
    full: CheckpointIndex, moments: MomentFolder, layers: Layers, weighting: WeightingConfig
) -> ConfigError:
    left = layers.unmeasured + layers.unknown
    if left:
        return ConfigError(
            f"Nothing to edit is left: of {some(left)} in {full.folder} no token was measured in "
            f"{moments.folder}. Edit other layers with --layers all or --include."
        )
    if weighting.layers == "mlp" and weighting.include:
        return ConfigError(
            "--include matches no layer of an MLP. Leave out --layers mlp, or take another pattern."
        )
    return _no_linear(name for name in full.tensors if _is_wanted(name, weighting))


def _untrained(sources: Mapping[str, CheckpointIndex], selected: set[str], tied: bool) -> set[str]:
    """What every importance folder lacks: a buffer that is stored, as a router's correction.

    What is missing on one side alone is an error, and so is a weight.
    """
    indices = [sources[role] for role in IMPORTANCE_ROLES.values() if role in sources]
    missing = {
        name
        for name in selected
        if not name.endswith("weight") and not any(_find(i, name, tied) for i in indices)
    }
    if not indices or not missing:
        return set()
    say(
        f"edit: {len(missing)} tensors that the importance does not know, such as {min(missing)}, "
        "are no trained weights and stay as they are"
    )
    return missing


def check_linear(targets: Iterable[Target]) -> None:
    """Stop with a ConfigError at patterns that, by shapes and names, leave no linear layer."""
    entries = [target.full for target in targets if target.sources]
    if not any(map(is_of_a_layer, entries)):
        raise _no_linear(entry.name for entry in entries)


def _no_linear(selected: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"--include and --exclude leave {min(selected)} and no weight of a linear layer, which "
        "are all that a structured method edits; embeddings, norms, biases and the output head "
        "stay as they are. Take another pattern, such as '*.mlp.*'."
    )


def open_sources(method: Edit, inputs: EditInputs) -> dict[str, CheckpointIndex]:
    """Open everything but θ_full that a method needs, by role; ConfigError if one is missing."""
    sources = _open_checkpoints(method, inputs)
    needs = method.needs
    if needs.moments:
        if inputs.direction is None:
            raise ConfigError(
                f"`{method.name}` subtracts a direction that was computed before: give the "
                "direction's folder, or use `perta edit` with the moment folders."
            )
        return {**sources, DIRECTION: open_direction(inputs.direction)}
    if not needs.importance:
        return sources
    order = method.order
    folders = {"forget": inputs.forget_importance, "retain": inputs.retain_importance}
    given = {side: folder for side in needs.importance if (folder := folders[side]) is not None}
    for missing in needs.importance:
        if missing not in given:
            at = inputs.base if needs.at == "base" else inputs.full
            reduction = f" --reduction {needs.reduction}" if needs.reduction else ""
            raise ConfigError(
                f"`{method.name}` needs --{missing}-importance. Make it with `perta importance "
                f"--checkpoint {at} --data {missing.upper()}_SET --order {order:g}{reduction} "
                "--output ...`."
            )
    _check_sidecars(method, list(given.values()))
    for side, folder in given.items():
        sources[IMPORTANCE_ROLES[side]] = open_index(order_folder(folder, order))
    return sources


def _open_checkpoints(method: Edit, inputs: EditInputs) -> dict[str, CheckpointIndex]:
    """Open the models that directions are taken from."""
    if method.direction == "full":
        return {FORGET: open_index(inputs.full)}
    base = inputs.base
    sources = {BASE: open_index(base)}
    tuned: dict[str, Path] = {}
    if method.direction == "full - base":
        # θ_full takes the place of the forget checkpoint.
        sources[FORGET] = open_index(inputs.exact or inputs.full)
    else:
        check_count(method, base, len(inputs.forget_checkpoints))
        tuned = {forget_role(i): folder for i, folder in enumerate(inputs.forget_checkpoints)}
    if method.needs.retain_checkpoint:
        if inputs.retain_checkpoint is None:
            raise ConfigError(
                f"`{method.name}` needs --retain-checkpoint. Make it with `perta finetune --base "
                f"{base} --data RETAIN_SET --output ...`; a sample of the set may do (--samples)."
            )
        tuned[RETAIN] = inputs.retain_checkpoint
    for role, folder in tuned.items():
        if base.resolve() == folder.resolve():
            kind = "retain" if role == RETAIN else "forget"
            raise ConfigError(
                f"{base} is given both as base and as {kind} checkpoint, so the edit would change "
                f"nothing. The {kind} checkpoint is the base tuned on the {kind} set; make it with "
                f"`perta finetune --base {base} --data {kind.upper()}_SET --output ...`."
            )
        sources[role] = open_tuned(folder, sources[BASE])
    return sources


def check_count(method: Edit, base: Path, count: int) -> None:
    """Stop with a ConfigError at fewer forget checkpoints than a method needs."""
    least = method.needs.tuned
    make = f"`perta finetune --base {base} --data FORGET_SET"
    if count < least and least > 1:
        raise ConfigError(
            f"`{method.name}` compares several task vectors and needs --forget-checkpoint at least "
            f"{least} times, but there {'is' if count == 1 else 'are'} {count}. Make more with "
            f"{make} --seed 1 --output ...`."
        )
    if count == 0:
        raise ConfigError(
            f"`{method.name}` needs --forget-checkpoint. Make it with {make} --output ...`."
        )


def _check_sidecars(method: Edit, folders: Sequence[Path]) -> None:
    sidecars = [read_sidecar(folder) for folder in folders]
    reductions = [sidecar.get("reduction") for sidecar in sidecars]
    wanted = method.needs.reduction
    if wanted is not None and reductions[0] != wanted:
        raise CheckpointMismatchError(
            f"`{method.name}` is defined on importance with reduction {wanted}, but "
            f"{folders[0]} has {reductions[0]}. Make it again with `perta importance --reduction "
            f"{wanted} ...`."
        )
    for key, what in (("model_fingerprint", "of different models"), ("reduction", "reduced")):
        values = [sidecar.get(key) for sidecar in sidecars]
        if values[0] != values[-1]:
            raise CheckpointMismatchError(
                f"{folders[0]} and {folders[-1]} cannot be compared: they are {what} "
                f"({key} is {values[0]} and {values[-1]}). Make both with the same "
                "`perta importance` settings and checkpoint."
            )


def share_of_examples(forget_importance: Path, retain_importance: Path) -> float:
    """Share, in (0, 1), of the examples of both sets, whole ones, that the forget set has."""
    counts = []
    for folder in (forget_importance, retain_importance):
        count = read_sidecar(folder).get("examples_available")
        if not isinstance(count, int) or count <= 0:
            raise CorruptCheckpointError(
                f"{folder}: its sidecar does not say how many examples the set has. Make it again "
                "with `perta importance`."
            )
        counts.append(count)
    return counts[0] / sum(counts)


def _select(
    full: CheckpointIndex, names: Mapping[str, str], weighting: WeightingConfig
) -> set[str]:
    """Parameters to edit; of one with two names, the patterns may match either."""
    stored: dict[str, list[str]] = {}
    for name, first in names.items():
        if not is_constant(full.tensors[name]):
            stored.setdefault(first, []).append(name)
    for flag, patterns in (("include", weighting.include), ("exclude", weighting.exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ConfigError(
                    f"--{flag} {pattern} matches no tensor of {full.folder}, such as "
                    f"{min(names, default='(none)')}. Put patterns in quotes: '*.mlp.*'."
                )
    selected = set()
    for first, twins in stored.items():
        included = not weighting.include or any(matches(n, weighting.include) for n in twins)
        if included and not any(matches(name, weighting.exclude) for name in twins):
            selected.add(first)
    if not selected:
        raise ConfigError("--include and --exclude leave no tensor to edit.")
    return selected


def _in_mlps(full: CheckpointIndex, selected: set[str]) -> set[str]:
    """Those of the selected parameters that lie in MLPs; where these cannot be told, in layers."""
    of_mlps = _mlp(full)
    if of_mlps is None:
        return {name for name in selected if is_of_a_layer(full.tensors[name])}
    if not selected & of_mlps:
        raise ConfigError(
            "--layers mlp and the patterns of --include and --exclude leave no tensor to edit, "
            f"such as {min(of_mlps)}. Leave one of them out."
        )
    return selected & of_mlps


def is_of_a_layer(entry: TensorEntry) -> bool:
    """Whether a tensor looks like a linear layer's weight, by its shape and name alone."""
    return len(entry.shape) > 1 and not name_ends_with(entry.name, HEADS + _EMBEDDINGS + _POSITIONS)


def _key(name: str, tied: bool) -> str:
    """What a tensor is called when storage of tied weights is looked through."""
    is_shared = tied and (name_ends_with(name, HEADS) or name_ends_with(name, _EMBEDDINGS))
    return "tied input embedding and output head" if is_shared else name


def _find(index: CheckpointIndex, name: str, tied: bool) -> TensorEntry | None:
    """An input's tensor by another's name; of tied weights the first that is stored."""
    if (key := _key(name, tied)) == name:
        return index.find(name)
    return next((entry for own, entry in index.tensors.items() if _key(own, tied) == key), None)


def _is_tied(full: CheckpointIndex, checkpoints: Iterable[CheckpointIndex]) -> bool:
    """Whether input embedding and output head are one parameter, by configuration and values."""
    config = read_config(full.folder)
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, dict) else {}
    if not config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", True)):
        return False
    for index in checkpoints:
        heads = [entry for name, entry in index.tensors.items() if name_ends_with(name, HEADS)]
        inputs = [
            entry for name, entry in index.tensors.items() if name_ends_with(name, _EMBEDDINGS)
        ]
        if len(heads) > 1 or len(inputs) > 1:
            return False
        if heads and inputs and not _equal(heads[0], inputs[0]):
            return False
    return True


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 20
    buffers = torch.empty(2, min(step, one.nbytes), dtype=torch.uint8)
    with opened(one.file) as first, opened(other.file) as second:
        for start in range(0, one.nbytes, step):
            count = min(step, one.nbytes - start)
            left, right = buffers[0, :count], buffers[1, :count]
            read_into(first, one.offset + start, left.numpy().data, one)
            read_into(second, other.offset + start, right.numpy().data, other)
            if not torch.equal(left, right):
                return False
    return True


def _align(
    full: CheckpointIndex,
    index: CheckpointIndex,
    role: str,
    selected: set[str],
    tied: bool,
    weighting: WeightingConfig,
) -> dict[str, TensorEntry]:
    """Find an input's tensor for every parameter to edit, by θ_full's name."""
    found = {name: _find(index, name, tied) for name in sorted(selected)}
    missing = [name for name, entry in found.items() if entry is None]
    extra = sorted(
        entry.name
        for entry in index.tensors.values()
        if not is_constant(entry)
        and _is_wanted(entry.name, weighting)
        and _find(full, entry.name, tied) is None
    )
    if missing or extra:
        raise _name_mismatch(full, index, role, missing, extra)
    aligned = {name: entry for name, entry in found.items() if entry is not None}
    for name, entry in aligned.items():
        if entry.shape != full.tensors[name].shape:
            raise _shape_mismatch(full, index, full.tensors[name], entry)
    return aligned


def _is_wanted(name: str, weighting: WeightingConfig) -> bool:
    included = not weighting.include or matches(name, weighting.include)
    return included and not matches(name, weighting.exclude)


def _name_mismatch(
    full: CheckpointIndex, index: CheckpointIndex, role: str, missing: list[str], extra: list[str]
) -> CheckpointMismatchError:
    name = (missing or extra)[0]
    count = len(missing) + len(extra)
    more = f" ({count} tensors differ in all)" if count > 1 else ""
    few = count <= _FEW
    here, there = (full.folder, index.folder) if missing else (index.folder, full.folder)
    if role in (FORGET_IMPORTANCE, RETAIN_IMPORTANCE):
        cure = "Rerun `perta importance` on the base of the full checkpoint"
    else:
        cure = _one_family(index)
    # Where much differs the model is another one, and patterns would only hide it.
    leave = f", or leave such tensors as they are with --exclude '{name}'" if few else ""
    return CheckpointMismatchError(f"{name} is in {here} but not in {there}{more}. {cure}{leave}.")


def _shape_mismatch(
    full: CheckpointIndex, index: CheckpointIndex, ours: TensorEntry, theirs: TensorEntry
) -> CheckpointMismatchError:
    where = f"{ours.name} is {ours.shape} in {full.folder} but {theirs.shape} in {index.folder}"
    rows_differ = len(ours.shape) == len(theirs.shape) and ours.shape[1:] == theirs.shape[1:]
    if rows_differ and name_ends_with(ours.name, HEADS + _EMBEDDINGS):
        return CheckpointMismatchError(
            f"{where}: one of them has an enlarged or padded vocabulary. Give all of them the "
            f"same one with `model.resize_token_embeddings({ours.shape[0]})` and "
            "`save_pretrained` before anything is tuned or measured, or leave this tensor as it "
            f"is with --exclude '{ours.name}'."
        )
    return CheckpointMismatchError(f"{where}. {_one_family(index)}.")


def _one_family(index: CheckpointIndex) -> str:
    """The cure where a model is another one, whether it was made here or not."""
    return (
        "Both must share one base model: give models of one family, or make "
        f"{index.folder} again from the base of the full checkpoint"
    )


def short_name(dtype: torch.dtype) -> str:
    """A type's name without the library's."""
    return str(dtype).removeprefix("torch.")
