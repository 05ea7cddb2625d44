"""A training method along its path: the model after every epoch, and between two of them.

    learning rate ─ train, measuring what is known of the forget set after every epoch
      ├ it passed the retrained model's between two epochs ─ look for the place between them
      ├ it fell far below in the very first epoch ─ again, with a smaller rate
      └ it stayed above to the end ─ again, with a larger rate

The strength is a number of epochs; between two epochs weights are interpolated.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from perta.engine.train.unlearn import Trained, unlearn_by_training, with_method_defaults
from perta.errors import DivergenceError
from perta.models.load import stored_dtype
from perta.progress import warn
from perta.recipes.compare._draw import Draw
from perta.recipes.compare._model import Bench, means
from perta.recipes.compare._search import Try, search_between
from perta.recipes.compare._spec import TrainingSpec
from perta.recipes.compare.settings import CompareConfig
from perta.store.arithmetic import Place, round_as_stored
from perta.store.atomic import scratch_folder
from perta.store.costs import BACKWARD, FORWARD

_RATE_FACTOR = 3.0  # factor between the learning rates that are tried
RATE_TRIES = 3
"""Most learning rates tried; the first is the method's own."""

_BEYOND = 2
"""Epochs after what the retrained model knows was passed: equal resistance to
relearning may ask for more than equal forgetting."""


@dataclass
class TrainingPath:
    """The model after each epoch of one training."""

    learning_rate: float
    known: list[float]  # of the forget set after each epoch, the start's first
    folder: Path  # where weights after each epoch are kept while the path is of use
    close: Callable[[], None]
    dtype: torch.dtype  # type that `perta train` stores the result in
    places: Sequence[Place]  # where each parameter lies, for the rounding to that type
    trained: Trained | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: int = 1  # learning rates tried
    # measures at the end of the first of them, the method's own
    fixed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The weights are large and serve nobody once the path is gone.
        weakref.finalize(self, self.close)

    @property
    def default(self) -> float:
        """The last epoch: what the method does on its own."""
        return float(len(self.known) - 1)

    @property
    def largest(self) -> float:
        """Strength beyond which there is no weight."""
        return self.default

    def search(
        self, config: CompareConfig, measure: Callable[[float], float], _start: float, target: float
    ) -> list[Try]:
        """Look for the place of equal forgetting between two epochs."""
        made = [Try(float(i), p) for i, p in enumerate(self.known)]
        for below, above in pairwise(made):
            if above.known <= target < below.known:
                near = config.equal_tolerance
                return made[1:] + search_between(measure, below, above, target, near, config.tries)
        return made[1:]

    def at(self, full: Sequence[Tensor], strength: float) -> list[Tensor]:
        """Weights after a number of epochs, in the order of the model's parameters."""
        first = min(int(strength), len(self.known) - 1)
        below, share = list(self._after(full, first)), strength - first
        if share > 0:
            above = self._after(full, first + 1)
            below = [b.lerp(a, share) for b, a in zip(below, above, strict=True)]
        pairs = zip(below, self.places, strict=True)
        return [round_as_stored(v, self.dtype, place).to(v.dtype) for v, place in pairs]

    def put(self, bench: Bench, full: Sequence[Tensor], strength: float) -> None:
        """Give a model these weights."""
        bench.load(self.at(full, strength))

    def cost(self, strength: float) -> dict[str, float]:
        """Operations of training up to a strength; those of a frozen reference are not counted."""
        tokens = self.trained.forget_tokens + self.trained.retain_tokens if self.trained else 0
        share = strength / self.default if self.default else 0.0
        return {"train": share * (FORWARD + BACKWARD) * tokens}

    def facts(self) -> dict[str, float]:
        """What was chosen besides the strength."""
        return {"learning_rate": self.learning_rate, "attempts": float(self.attempts)}

    def rank(self, target: float) -> tuple[bool, float]:
        """Smaller is better: to pass the target, then to come near it after some epoch."""
        return not self.passes_by(target), min(abs(p - target) for p in self.known)

    def passes_by(self, target: float) -> bool:
        """Whether what is known falls to the target."""
        return min(self.known) <= target

    def keep(self, epoch: int, weights: Sequence[Tensor]) -> None:
        """Remember the weights after an epoch."""
        torch.save(list(weights), self._file(epoch))

    def _after(self, full: Sequence[Tensor], epoch: int) -> Sequence[Tensor]:
        if epoch == 0:
            return full
        kept: list[Tensor] = torch.load(self._file(epoch), map_location=full[0].device)
        return kept

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.pt"


def prepare_path(
    draw: Draw,
    spec: TrainingSpec,
    bench: Bench,
    full: Sequence[Tensor],
    start: float,
    target: float,
) -> TrainingPath:
    """Train with one learning rate after the other until the path passes equal forgetting.

    The first rate is the method's own, and that path is also what the method does by default. The
    last one passes, or is the nearest to it (`target`, from `start`) within the attempts.
    """
    settings = with_method_defaults(spec.method, spec.training)
    rate = settings.learning_rate or spec.method.learning_rate
    dtype = stored_dtype(draw.full)
    places = [Place(draw.seed, name) for name, _ in bench.model.named_parameters()]
    best: TrainingPath | None = None
    fixed: dict[str, float] = {}
    for attempt in range(1, RATE_TRIES + 1):
        bench.load(full)
        stack = ExitStack()
        folder = stack.enter_context(scratch_folder(draw.folder / "path"))
        path = TrainingPath(rate, [start], folder, stack.close, dtype, places)
        # The first path runs to its end, which is what the method does by default.
        is_too_fast = not _train(path, draw, spec, bench, target if attempt > 1 else 0.0)
        if attempt == 1 and not is_too_fast:
            fixed = {"strength": path.default, **means(bench.measure())}
        if not is_too_fast and (best is None or path.rank(target) < best.rank(target)):
            best = path
        crossed = path.passes_by(target)
        is_too_fast |= crossed and path.known[1] < target / 2
        if crossed and not is_too_fast:
            break
        rate = rate / _RATE_FACTOR if is_too_fast else rate * _RATE_FACTOR
    if best is None:
        raise DivergenceError(
            f"`{spec.name}` diverged at every learning rate down to {rate * _RATE_FACTOR:.2g}. "
            "Give it a smaller one, as in `npo:learning_rate=1e-7`."
        )
    best.attempts, best.fixed = attempt, fixed
    return best


def _train(
    path: TrainingPath, draw: Draw, spec: TrainingSpec, bench: Bench, stop_at: float
) -> bool:
    """Fill a path; False if training diverged."""
    started = time.perf_counter()

    def after_epoch(epoch: int) -> bool:
        path.known.append(bench.known())
        path.keep(epoch, [parameter.detach() for parameter in bench.model.parameters()])
        return sum(p <= stop_at for p in path.known) > _BEYOND

    forget, refusals = bench.with_refusals(spec.method, spec.training.seed)
    try:
        _, path.trained = unlearn_by_training(
            bench.model,
            forget,
            bench.encode(bench.sets["protected"]),
            replace(spec.training, seed=draw.seed, learning_rate=path.learning_rate),
            method=spec.method,
            pad=bench.pad,
            dtype=bench.dtype,
            refusals=refusals,
            after_epoch=after_epoch,
        )
    except DivergenceError as error:
        warn(str(error))
        return False
    finally:
        path.seconds["train"] = time.perf_counter() - started
    return True
