"""What became of a step, as sums that parts can be added to: how much of it was stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from perta.errors import CheckpointError
from perta.progress import say, warn

_LEAST_STORED = 0.1
"""Share of the wanted step below which an edit stops: it would report forgetting that is not in
the files."""

WELL_STORED = 0.9
"""Share of the wanted step below which a stage warns."""

_CURE = (
    "Store a wider type (--save-dtype float32), tune the forget checkpoint with a higher learning "
    "rate, or raise --scaling-coef."
)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What rounding left of a step δ, α · W ⊙ τ less any β · (θ_r − θ₀); s is what was stored."""

    wanted_norm: float  # L2 norm ‖δ‖
    delta_norm: float  # ‖s‖
    stored_share: float | None  # ⟨s, δ⟩ / ⟨δ, δ⟩, 1 where nothing is lost; None where δ is 0
    noise: float | None  # norm of the rest of s, which is not along δ, over ‖δ‖; None where δ is 0
    changed: float  # share of the weights whose stored value changed


@dataclass(frozen=True, kw_only=True)
class TensorSummary(Stored):
    """What the edit did to one tensor of θ_full; of a structured method W counts as 1."""

    name: str
    elements: int
    mean_weighting: float  # of W
    task_vector_norm: float  # L2 norm of the direction, τ or what the method puts in its place


@dataclass
class Sums:
    """Statistics of some elements, as sums, so that parts can be added."""

    weighting: float = 0.0  # of W
    task_vector: float = 0.0  # of τ²
    delta: float = 0.0  # of δ²
    along: float = 0.0  # of e · δ, with e = s − δ
    error: float = 0.0  # of e²
    changed: float = 0.0  # elements that changed

    def add(self, other: Sums) -> None:
        """Take in another part."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def stored(self, elements: int) -> Stored:
        """What rounding left of the step, over so many elements."""
        # The sums are of float32 products: what should be 0 may lie below it.
        stored = max(0.0, self.delta + 2 * self.along + self.error)
        share = noise = None
        if self.delta > 0:
            along, error = self.along / self.delta, self.error / self.delta
            share, noise = 1 + along, math.sqrt(max(0.0, error - along * along))
        return Stored(
            wanted_norm=math.sqrt(self.delta),
            delta_norm=math.sqrt(stored),
            stored_share=share,
            noise=noise,
            changed=self.changed / elements if elements else 0.0,
        )


def stored_of(summaries: Sequence[TensorSummary]) -> Stored:
    """What rounding left of a step, over several tensors."""
    total, elements = Sums(), 0
    for each in summaries:
        elements += each.elements
        total.changed += each.changed * each.elements
        if each.stored_share is None or each.noise is None:
            continue
        square, along = each.wanted_norm**2, each.stored_share - 1
        total.delta += square
        total.along += square * along
        total.error += square * (each.noise**2 + along * along)
    return total.stored(elements)


def tell_stored(stage: str, stored: Stored) -> None:
    """Say in one line what a stage stored of its step; warn where that is little."""
    if stored.stored_share is None:
        return
    say(
        f"{stage}: {stored.stored_share:.1%} of the step is stored, with rounding noise of "
        f"{stored.noise:.2g} of its norm; {stored.changed:.1%} of the edited weights changed"
    )
    if stored.stored_share < WELL_STORED:
        warn(f"The stored weights lack {1 - stored.stored_share:.0%} of the step. {_CURE}")


def check_stored(stored: Stored) -> None:
    """Stop where next to nothing of the wanted step is in the files."""
    if stored.stored_share is not None and abs(stored.stored_share) < _LEAST_STORED:
        raise CheckpointError(
            f"Of the step that the edit takes {stored.stored_share:.1%} would be stored: it is too "
            "small beside the weights for the type of the output. "
            f"{_CURE} Nothing was written."
        )
