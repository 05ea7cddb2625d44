"""The one training loop: fine-tuning and unlearning by training are two objectives of it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from perta.data.batch import Batch, Encoded, bucketed, rows_per_pass
from perta.engine.train.optimizer import Resume, Trainer, step_groups
from perta.models.loss import losses_of
from perta.models.precision import products_in
from perta.parallel import count, place, summed, told
from perta.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameters of `mallopt` of the GNU C library: what we set, and about what it sets by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


class _Objective(Protocol):
    """What a run trains for, and what it has seen so far."""

    @property
    def history(self) -> Mapping[str, Any]:
        """All that a killed run needs of this object to go on, as plain values."""
        ...

    def restore(self, history: Mapping[str, Any]) -> None:
        """Go on from what `history` gave."""
        ...

    def backward(self, batch: Batch, size: int) -> str:
        """Add the gradient of one batch of a step that has `size` examples; a note on it."""
        ...

    def finish_step(self, size: int, epoch: int) -> bool:
        """Whether gathered gradients are worth a step; DivergenceError at a loss not finite."""
        ...

    def finish_epoch(self, epoch: int) -> bool:
        """Whether an epoch, from 1, was the last needed; DivergenceError if losses rose far."""
        ...


def train(
    trainer: Trainer,
    objective: _Objective,
    examples: Sequence[Encoded],
    *,
    title: str,
    pad: int,
    resume: Resume | None,
) -> None:
    """Run every epoch in a seeded order, or as many as the objective needs, from step one."""
    settings = trainer.settings
    done, epochs = 0, trainer.epochs
    saved = told(resume.load(trainer) if resume else None)
    if saved and (state := told(trainer.state())) and place():
        trainer.restore(state)
    if saved:
        done = saved[0]
        objective.restore(saved[1])
    with _memory_kept(), track(title, (epochs - done) * len(examples)) as advance:
        for epoch in range(done + 1, epochs + 1):
            trainer.model.train()
            batches = bucketed(examples, settings.batch_size, pad, trainer.generator)
            for group in step_groups(batches, settings.accumulation):
                size = sum(len(batch) for batch in group)
                for batch in group:
                    advance(len(batch), objective.backward(batch, size))
                if objective.finish_step(size, epoch):
                    trainer.step()
            trainer.model.eval()
            if objective.finish_epoch(epoch):
                break
            if resume and epoch < epochs:
                resume.save(trainer, epoch, objective.history)


def add_gradient(
    trainer: Trainer,
    term: Callable[[Batch], Tensor],
    batch: Batch,
    weight: float,
    *,
    above: float | None = None,
) -> Tensor:
    """Add the gradient of weight * (sum of a batch's terms), each by its example's weight.

    Terms at or below `above` add nothing. Each process adds that of its share of the examples; the
    terms of all of them, (B,), come back unweighted.
    """
    device = trainer.model.device
    own, is_idle = slice(place(), None, count()), place() >= len(batch)
    values = torch.zeros(len(batch), device=device)
    is_divided = trainer.whole is not None
    if is_divided:
        # All take part in each pass, for its weights, and FSDP2 averages what they add.
        weight *= count()
        own = slice(0, 1) if is_idle else own
    if is_divided or not is_idle:
        rows = batch.rows(own).to(device)
        with products_in(trainer.products, device):
            terms = term(rows)
        weighted = terms[:0] if is_idle else terms * rows.weights
        if not is_idle:
            values[own] = terms.detach()
        if above is not None and not is_idle:
            weighted = weighted[values[own] > above]
        if is_divided or len(weighted):
            (weight * weighted.sum()).backward()
    return summed(values)


def losses_after(
    trainer: Trainer, model: PreTrainedModel, examples: Sequence[Encoded], pad: int
) -> list[float]:
    """Loss of every example once training is done, with the products that it was done in."""
    rows = max(trainer.settings.batch_size, rows_per_pass(_ROWS, model.device))
    with products_in(trainer.products, model.device):
        return losses_of(model, examples, batch_size=rows, pad=pad)


_ROWS = 16  # of a pass in which nothing is trained


@contextmanager
def _memory_kept() -> Iterator[None]:
    """Let the GNU C library keep what is freed to the end, which saves a tenth of a step."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for parameter, value in _KEEPING.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
