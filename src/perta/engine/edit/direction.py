"""The weighted direction of a structured method, layer by layer.

    task vector (base and forget) ─┐
    retain moments ────────────────┼─ one solve a layer ── Δ, float32, checkpoint names
    forget moments (not all) ──────┘

Layers that read the same input are solved at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from perta.errors import CheckpointError, CheckpointMismatchError, DivergenceError
from perta.methods.method import Direction, Directions, Side, mean
from perta.parallel import count, gathered, share, stream
from perta.progress import track
from perta.store.checkpoint import CheckpointIndex, TensorEntry, open_index, read_tensor
from perta.store.fingerprint import fingerprint
from perta.store.measured.moments import MomentFolder, open_moments


def check_moments(folder: Path, models: Collection[Path], gradients: bool) -> MomentFolder:
    """Open a moment folder and check that it serves a direction for some of these models."""
    opened = open_moments(folder)
    if opened.facts.get("model_fingerprint") not in {fingerprint(model) for model in models}:
        raise CheckpointMismatchError(
            f"{folder} holds moments of another model than {' or '.join(map(str, models))}. Make "
            f"it again with `perta moments --checkpoint {next(iter(models))} ...`."
        )
    if gradients and not opened.facts["outputs"]:
        raise CheckpointError(
            f"{folder} has no moments of output gradients. Make it again with `perta moments "
            "--gradients ...`."
        )
    return opened


_Solved = tuple[str, Tensor, dict[str, float]]
"""A weight's name, its Δ, and what the solve reports."""


@dataclass
class Solver:
    """Walks over groups of layers with one input; `run` fills `layers` with what solves report."""

    method: Directions
    base: CheckpointIndex
    tuned: Sequence[CheckpointIndex]  # θ_f, one or several
    moments: Mapping[Side, MomentFolder]  # of the sets that the method needs
    names: tuple[str, ...]  # layers to edit, as the moments name them
    device: torch.device
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and Δ of every weight, float32, as the checkpoint stores it."""
        with track("Direction", len(self.names)) as advance:
            for name, delta, facts in stream(Solver._run, self):
                self.layers[name] = facts
                yield name, delta
                advance()

    def _run(self) -> Iterator[_Solved]:
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(self.moments["retain"].facts["inputs"][name], []).append(name)
        todo = [*groups.values()]
        for first in range(0, len(todo), count()):
            own = [s for names in share(todo[first : first + count()]) for s in self._solved(names)]
            for found in gathered(own):
                yield from found

    def _solved(self, names: Sequence[str]) -> Iterator[_Solved]:
        """Layers with one input."""
        vectors = [self._task_vector(name) for name in names]
        try:
            found = list(self._solve(names, vectors))
        except DivergenceError as error:
            raise DivergenceError(f"{names[0]}: {error}") from None
        for name, vector, direction in zip(names, vectors, found, strict=True):
            facts = {
                "task_vector_norm": float(vector.norm()),
                "direction_norm": float(direction.delta.norm()),
                "condition": direction.condition,
                "damping": direction.damping,
            }
            yield name, self._as_stored(name, direction.delta).float().cpu(), facts

    def _solve(self, names: Sequence[str], vectors: Sequence[Tensor]) -> Iterable[Direction]:
        def outputs(place: int) -> dict[Side, Tensor]:
            return self._moments(MomentFolder.output_moment, names[place], len(vectors[place]))

        inputs = self._moments(MomentFolder.input_moment, names[0], vectors[0].shape[1])
        return self.method.solve(vectors, inputs, outputs)

    def _moments(
        self, read: Callable[[MomentFolder, str], Tensor], name: str, width: int
    ) -> dict[Side, Tensor]:
        """Moments of a weight on every set there is."""
        found: dict[Side, Tensor] = {}
        for side, folder in self.moments.items():
            moment = read(folder, name)
            if moment.shape[1] != width or moment.shape[0] > width:
                raise CheckpointMismatchError(
                    f"{name} is {width} wide, but its moment in {folder.folder} is "
                    f"{tuple(moment.shape)}. The moments are of another model."
                )
            found[side] = moment.to(self.device)
        return found

    def _task_vector(self, name: str) -> Tensor:
        """τ of one weight, (out, in) float64."""
        base, *tuned = (
            read_tensor(cast(TensorEntry, index.find(name))).to(self.device, torch.float64)
            for index in (self.base, *self.tuned)
        )
        return self._as_stored(name, mean(tuned).sub_(base))

    def _as_stored(self, name: str, weight: Tensor) -> Tensor:
        """Turn a weight from its stored orientation to (out, in), or back."""
        return weight.t() if name in self._transposed else weight

    @property
    def _transposed(self) -> set[str]:
        return set(self.moments["retain"].facts["transposed"])


def open_solver(
    method: Directions,
    base: Path,
    tuned: Sequence[Path],
    moments: Mapping[Side, Path],
    models: Collection[Path],
    choose: Callable[[MomentFolder], tuple[str, ...]],
    device: torch.device,
) -> Solver:
    """Open everything a direction is computed from, and check that it belongs together.

    `moments` were measured at one of `models`, base and full; `choose` picks layers by those of the
    retain set. CheckpointMismatchError where models, tokens or layers differ.
    """
    opened = {
        side: check_moments(folder, models, method.needs.gradients)
        for side, folder in moments.items()
    }
    retain = opened["retain"]
    for key in ("model_fingerprint", "token_choice", "inputs", "transposed"):
        for other in opened.values():
            if other.facts.get(key) != retain.facts.get(key):
                raise CheckpointMismatchError(
                    f"{other.folder} and {retain.folder} cannot be compared: {key} differs. Make "
                    "both with the same `perta moments` settings and checkpoint."
                )
    names = choose(retain)
    start, *others = (open_index(folder) for folder in (base, *tuned))
    for index in others:
        for name in names:
            shapes = [entry.shape if (entry := i.find(name)) else None for i in (start, index)]
            if shapes[0] is None or shapes[0] != shapes[1]:
                raise CheckpointMismatchError(
                    f"{name} has moments and is {shapes[0] or 'missing'} in {base} and "
                    f"{shapes[1] or 'missing'} in {index.folder}. Both must share the model that "
                    "the moments were measured at."
                )
    return Solver(method, start, others, opened, names, device)
