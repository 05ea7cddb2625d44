"""The streaming editor: read a chunk of every input, edit it, write it, in threads.

    spans of θ_full's tensors ── threads: chunk by chunk, in, edited, out ── statistics

Where a chunk goes is known before anything is computed. Arithmetic is float32, rounded once to
θ_full's type.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from perta.engine.edit._chunks import (
    SPAN_CHUNKS,
    Blocks,
    Buffers,
    Reader,
    Readers,
    Span,
    in_threads,
    spans,
)
from perta.engine.edit.plan import BASE, FULL, RETAIN, Target, short_name
from perta.errors import DivergenceError
from perta.parallel import Own, everywhere, gathered, share
from perta.store.arithmetic import Place, Step, scale, square_norm, subtract
from perta.store.checkpoint import TensorEntry, opened, write_from


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What rounding to the stored type left of a step.

    The wanted step δ is α · W ⊙ τ, less β · (θ_r − θ₀) where the method adds that; s is what was
    stored, the old values less the new ones.
    """

    wanted_norm: float  # L2 norm ‖δ‖
    delta_norm: float  # ‖s‖
    stored_share: float | None  # ⟨s, δ⟩ / ⟨δ, δ⟩, 1 where nothing is lost; None where δ is 0
    noise: float | None  # norm of the rest of s, which is not along δ, over ‖δ‖; None where δ is 0
    changed: float  # share of the weights whose stored value changed


@dataclass(frozen=True, kw_only=True)
class TensorSummary(Stored):
    """What the edit did to one tensor of θ_full.

    `mean_weighting` is the mean of W; `task_vector_norm` the L2 norm of the direction, τ = θ_f − θ₀
    or what the method puts in its place. Of a structured method that is the weighted direction, and
    W counts as 1.
    """

    name: str
    elements: int
    mean_weighting: float
    task_vector_norm: float


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
            value = getattr(self, item.name) + getattr(other, item.name)
            setattr(self, item.name, value)

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


@dataclass(frozen=True)
class Editor:
    """What every thread shares, and does to one span."""

    outputs: Mapping[str, TensorEntry]  # the output's tensors by name
    blocks: Blocks  # the method, its settings, and what it looks at
    cuts: tuple[float, ...] = ()  # smallest scores kept, for methods that rank weights

    @property
    def scaling_coef(self) -> float:
        """α, which `with_defaults` has filled in."""
        return cast(float, self.blocks.weighting.scaling_coef)

    def run(self, target: Target, start: int, stop: int, buffers: Buffers) -> Sums:
        """Read, edit and write the elements from `start` to `stop` of one tensor."""
        sums, chunk = Sums(), self.blocks.chunk
        place = self.outputs[target.full.name]
        roles = (FULL, *target.sources)
        with (
            self.blocks.opened(target, roles, buffers) as readers,
            opened(place.file, os.O_WRONLY) as output,
        ):
            for begin in range(start, stop, chunk):
                count = min(chunk, stop - begin)
                if target.sources:
                    stored = self._edit(target, readers, begin, count, sums)
                else:
                    stored = self._copy(target, readers[FULL], begin, count)
                offset = place.offset + begin * place.dtype.itemsize
                write_from(output, offset, stored.view(torch.uint8).numpy().data)
        return sums

    def _copy(self, target: Target, full: Reader, begin: int, count: int) -> Tensor:
        """One chunk as it is, in the type of the output."""
        full.read(begin, count)
        full.check_copy(begin, count)
        stored = full.raw.to(self.outputs[target.full.name].dtype)
        if stored.dtype != full.raw.dtype and not bool(torch.isfinite(stored).all()):
            raise _out_of_range(target, stored.dtype)
        return stored

    def _edit(self, target: Target, readers: Readers, begin: int, count: int, sums: Sums) -> Tensor:
        """Turn one chunk of θ_full into one of θ_u; adds what it did to `sums`."""
        method, scaling_coef = self.blocks.method, self.scaling_coef
        vectors = self.blocks.task_vectors(readers, begin, count)
        block = self.blocks.block(target, readers, begin, count, self.cuts)
        task_vector = block.task_vector = method.combine(vectors, block)
        weighting = method.weigh(block)
        norm = square_norm(task_vector)
        delta = scale(task_vector, weighting, scaling_coef)
        if isinstance(weighting, Tensor):
            done = Sums(float(weighting.sum()), norm, square_norm(delta))
        else:
            done = Sums(weighting * count, norm, norm * (weighting * scaling_coef) ** 2)
        retain_coef = method.retain_coef if RETAIN in readers else 0.0
        if retain_coef != 0:
            base = readers[BASE].load(begin, count)
            retain_vector = readers[RETAIN].read_difference(base, begin, count)
            done.delta = square_norm(delta.sub_(retain_vector.mul_(retain_coef)))
        stored = readers[FULL].load(begin, count).to(self.outputs[target.full.name].dtype)
        # Without a step the stored bytes stay: 0 - (-0) would turn a stored -0 into 0.
        if scaling_coef != 0 or retain_coef != 0:
            step = subtract(stored, delta, self._place(target, begin))
        else:
            step = Step(square_norm(stored.to(torch.float32)))
        self._check(done, step.squares, stored, readers, begin, count)
        done.along, done.error, done.changed = step.along, step.error, step.changed
        sums.add(done)
        return stored

    def _place(self, target: Target, begin: int) -> Place:
        name = target.alias_of or target.full.name
        return Place(self.blocks.weighting.weighting_seed, name, begin)

    def _check(
        self, sums: Sums, square: float, stored: Tensor, readers: Readers, begin: int, count: int
    ) -> None:
        """Stop at values that are not finite; the norms alone show that there are none.

        The norm of a chunk bounds its largest value, so a finite norm of the task vector and a
        norm of the result below the largest number of the output's type clear every input and the
        cast. Only when that fails are the values themselves looked at. `square` is the squared
        norm of the result before the cast.
        """
        limit = torch.finfo(stored.dtype).max / 2
        is_direction_finite = math.isfinite(sums.task_vector)
        if is_direction_finite and square < limit * limit:
            return
        if is_direction_finite and bool(torch.isfinite(stored.to(torch.float32)).all()):
            return
        for reader in readers.values():
            reader.check(begin, count)
        raise DivergenceError(
            f"The edit of {readers[FULL].entry.name} leaves the range of "
            f"{short_name(stored.dtype)}. Use a smaller --scaling-coef or a method with W in "
            "[0, 1], or a wider type (--save-dtype)."
        )


def _out_of_range(target: Target, dtype: torch.dtype) -> DivergenceError:
    return DivergenceError(
        f"{target.full.name} holds numbers outside the range of {short_name(dtype)}. Use a wider "
        "type (--save-dtype)."
    )


def edit_all(
    targets: list[Target], editor: Editor, worker_count: int, advance: Callable[[], None]
) -> tuple[TensorSummary, ...]:
    """Edit every tensor in threads; `advance` is called once for each that is finished."""
    return everywhere(_edit_share, targets, editor, worker_count, Own(advance))


def _edit_share(
    targets: list[Target], editor: Editor, worker_count: int, advance: Own[Callable[[], None]]
) -> tuple[TensorSummary, ...]:
    span = editor.blocks.chunk * SPAN_CHUNKS
    finished = Finished(targets, span)
    done: list[tuple[Span, Sums]] = []

    def finish(job: Span, sums: Sums) -> None:
        if finished.add(job, sums) and advance.value:
            advance.value()

    def work(job: Span, buffers: Buffers) -> None:
        sums = editor.run(targets[job.target], job.start, job.stop, buffers)
        done.append((job, sums))
        finish(job, sums)

    in_threads(share([*spans(targets, span)]), work, editor.blocks.chunk, worker_count)
    for others in gathered(done)[1:]:
        for job, sums in others:
            finish(job, sums)
    return finished.summaries()


class Finished:
    """Statistics from all threads, added in the order of the files whatever the threads do."""

    def __init__(self, targets: list[Target], span: int) -> None:
        self._targets, self._lock = targets, threading.Lock()
        self._left = [math.ceil(target.full.numel / span) for target in targets]
        self._parts: dict[tuple[int, int], Sums] = {}

    def add(self, job: Span, sums: Sums) -> bool:
        """Take in one span; whether its tensor is finished."""
        with self._lock:
            self._parts[job.target, job.part] = sums
            self._left[job.target] -= 1
            return not self._left[job.target]

    def summaries(self) -> tuple[TensorSummary, ...]:
        """Of every edited tensor, in the order of the files."""
        totals: dict[int, Sums] = {}
        for target, part in sorted(self._parts):
            totals.setdefault(target, Sums()).add(self._parts[target, part])
        return tuple(
            TensorSummary(
                name=target.full.name,
                elements=target.full.numel,
                mean_weighting=sums.weighting / target.full.numel,
                task_vector_norm=math.sqrt(sums.task_vector),
                **vars(sums.stored(target.full.numel)),
            )
            for index, target in enumerate(self._targets)
            if target.sources and target.alias_of is None and (sums := totals.get(index))
        )
