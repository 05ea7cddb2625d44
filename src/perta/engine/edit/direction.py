"""The weighted direction of a structured method, layer by layer.

    task vector (base and forget) ─┐
    retain moments ────────────────┼─ one solve a layer ── Δ, float32, checkpoint names
    forget moments (not all) ──────┘

Layers that read the same input are solved at once. A task vector of two thin factors, τ = B A,
stays one where the method multiplies τ from the right: Δ = B (A M⁻¹), and r rows are solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from perta.engine.edit._chunks import not_finite
from perta.errors import CheckpointError, CheckpointMismatchError, DivergenceError
from perta.methods.method import Direction, Directions, Side, mean
from perta.models.formats.low_rank import (
    Thin,
    ThinEntry,
    joined,
    named_tensors,
    open_tuned,
    read_thin,
)
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


_Matrix = Tensor | Thin
_Solved = tuple[str, _Matrix, dict[str, float]]
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
        """Yield name and Δ of every weight, or its factors, float32, in the stored orientation."""
        with track("Direction", len(self.names)) as advance:
            for name, delta, facts in stream(Solver._run, self):
                self.layers[name] = facts
                yield from named_tensors(name, delta)
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
            found = self._solve(names, vectors)
        except DivergenceError as error:
            raise DivergenceError(f"{names[0]}: {error}") from None
        for name, vector, (delta, direction) in zip(names, vectors, found, strict=True):
            facts = {
                "task_vector_norm": float(vector.norm()),
                "direction_norm": float(delta.norm()),
                "condition": direction.condition,
                "damping": direction.damping,
            }
            yield name, self._as_stored(name, delta), facts

    def _solve(
        self, names: Sequence[str], vectors: Sequence[_Matrix]
    ) -> list[tuple[_Matrix, Direction]]:
        """Δ of every layer, and how it was found."""

        def outputs(place: int) -> dict[Side, Tensor]:
            return self._moments(MomentFolder.output_moment, names[place], len(rows[place]))

        thin = [v if self.method.by_rows and isinstance(v, Thin) else None for v in vectors]
        rows = [
            factors.right if factors else v.whole() if isinstance(v, Thin) else v
            for v, factors in zip(vectors, thin, strict=True)
        ]
        inputs = self._moments(MomentFolder.input_moment, names[0], rows[0].shape[1])
        return [
            (Thin(factors.left, found.delta) if factors else found.delta, found)
            for factors, found in zip(thin, self.method.solve(rows, inputs, outputs), strict=True)
        ]

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

    def _task_vector(self, name: str) -> _Matrix:
        """τ of one weight, (out, in) float64."""
        start, *entries = (cast(TensorEntry, i.find(name)) for i in (self.base, *self.tuned))
        steps = [read_thin(e, self.device) for e in entries if isinstance(e, ThinEntry)]
        whole = [e for e in entries if not isinstance(e, ThinEntry)]
        if all(e == start for e in whole):  # adapters that leave this weight as it is
            return self._as_stored(name, joined(steps, start.shape, 1 / len(entries)))
        base, *tuned = (self._weight(entry) for entry in (start, *whole))
        vectors = [*(other.sub_(base) for other in tuned), *(step.whole() for step in steps)]
        return self._as_stored(name, mean(vectors))

    def _weight(self, entry: TensorEntry) -> Tensor:
        """A weight in float64."""
        values = read_tensor(entry).to(self.device, torch.float64)
        if not values.isfinite().all():  # the direction would be at fault further on
            raise not_finite(entry)
        return values

    def _as_stored(self, name: str, weight: _Matrix) -> _Matrix:
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
    start = open_index(base)
    others = [open_tuned(folder, start) for folder in tuned]
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
