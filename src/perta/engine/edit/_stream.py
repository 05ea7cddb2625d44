"""The streaming editor: read a chunk of every input, make the step δ of it, give it to a sink.

    spans of θ_full's tensors ── threads: chunk by chunk, in, δ, to a sink ── statistics
                                                                ├ files: θ_full − δ, rounded (write)
                                                                └ memory: Δ itself (memory)

Arithmetic is float32.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from perta.engine.edit._chunks import (
    CHUNK,
    SPAN_CHUNKS,
    Blocks,
    Buffers,
    Readers,
    Span,
    in_threads,
    spans,
    steps_from_base,
)
from perta.engine.edit._passes import average_importance, find_cuts, find_unused
from perta.engine.edit.plan import (
    FULL,
    RETAIN,
    EditInputs,
    Target,
    open_sources,
    plan_edit,
    share_of_examples,
    short_name,
)
from perta.engine.edit.stored import Sums, TensorSummary
from perta.errors import CheckpointError, DivergenceError, some
from perta.methods.method import Edit
from perta.methods.registry import get_method, with_defaults
from perta.models.load import transposed_weights
from perta.options import WeightingConfig
from perta.parallel import Own, everywhere, gathered, share
from perta.progress import warn
from perta.store.arithmetic import scale, square_norm
from perta.store.checkpoint import open_index


@dataclass
class Step:
    """The step of one chunk of a tensor."""

    readers: Readers  # read what it was made of once more
    begin: int
    count: int
    delta: Tensor | None = None  # δ, float32 (count,); None where the tensor is copied
    is_still: bool = False  # whether α and β are 0, so that nothing is to move
    sums: Sums = field(default_factory=Sums)

    def refuse_infinite(self, dtype: torch.dtype) -> None:
        """Stop at inputs that are not finite, and where they are, at a result out of range."""
        for reader in self.readers.values():
            reader.check(self.begin, self.count)
        raise DivergenceError(
            f"The edit of {self.readers[FULL].entry.name} leaves the range of "
            f"{short_name(dtype)}. Use a smaller --scaling-coef or a method with W in "
            "[0, 1], or a wider type (--save-dtype)."
        )


Sink = Callable[[Target, Iterator[Step]], None]
"""Takes the steps of neighbouring chunks of one tensor; in several threads at once."""


@dataclass(frozen=True)
class Editor:
    """The source of an edit's steps: what every thread shares, and does to one span."""

    targets: list[Target]
    blocks: Blocks  # the method, its settings, and what it looks at
    workers: int  # threads

    def run(self, sink: Sink, target: Target, start: int, stop: int, buffers: Buffers) -> Sums:
        """Give a sink the steps of the elements from `start` to `stop` of one tensor."""
        sums, chunk = Sums(), self.blocks.chunk

        def steps() -> Iterator[Step]:
            with self.blocks.opened(target, (FULL, *target.sources), buffers) as readers:
                for begin in range(start, stop, chunk):
                    step = Step(readers, begin, min(chunk, stop - begin))
                    if target.sources:
                        self._make(step, target)
                    yield step
                    sums.add(step.sums)

        sink(target, steps())
        return sums

    def _make(self, step: Step, target: Target) -> None:
        """Fill in δ, and what it is made of."""
        method = self.blocks.method
        scaling_coef = cast(float, self.blocks.weighting.scaling_coef)  # by `with_defaults`
        readers, begin, count = step.readers, step.begin, step.count
        vectors = self.blocks.task_vectors(readers, begin, count)
        block = self.blocks.block(target, readers, begin, count)
        task_vector = block.task_vector = method.combine(vectors, block)
        weighting = method.weigh(block)
        norm = square_norm(task_vector)
        delta = step.delta = scale(task_vector, weighting, scaling_coef)
        if isinstance(weighting, Tensor):
            step.sums = Sums(float(weighting.sum()), norm, square_norm(delta))
        else:
            step.sums = Sums(weighting * count, norm, norm * (weighting * scaling_coef) ** 2)
        retain_coef = method.retain_coef if RETAIN in readers else 0.0
        if retain_coef != 0:
            (retain_vector,) = steps_from_base(readers, [RETAIN], begin, count)
            step.sums.delta = square_norm(delta.sub_(retain_vector.mul_(retain_coef)))
        step.is_still = scaling_coef == retain_coef == 0


def open_edit(
    inputs: EditInputs, weighting: WeightingConfig, threads: int | None = None, chunk: int = CHUNK
) -> Editor:
    """Plan an edit and look at its inputs, as far as no single chunk can tell; see `write_edit`."""
    weighting = with_defaults(weighting)
    method = get_method(weighting.method)
    targets = plan_edit(open_index(inputs.full), open_sources(method, inputs), weighting)
    workers = threads or min(8, os.cpu_count() or 1)
    if method.weighs_retain:
        _tell_unused(targets, find_unused(targets, chunk, workers))
    transposed = transposed_weights(inputs.full) if weighting.granularity == "row" else frozenset()
    averages = average_importance(targets, weighting, transposed, chunk, workers)
    blocks = Blocks(method, weighting, chunk, averages, _forget_share(method, inputs))
    return Editor(targets, replace(blocks, cuts=find_cuts(targets, blocks, workers)), workers)


def _tell_unused(targets: Sequence[Target], unused: Collection[str]) -> None:
    """Name what is subtracted whole because retention does not depend on it; stop if all is."""
    names = [target.full.name for target in targets if target.sources and not target.alias_of]
    left = [name for name in names if name in unused]
    if left and len(left) == len(names):
        raise CheckpointError(
            "The importance on the retain set is 0 in every tensor to edit, so nothing says what "
            "must be kept. Measure it again on examples that the model can be wrong about."
        )
    if left:
        warn(
            f"No retained example depends on {some(left)}: the importance on the retain set is 0 "
            "throughout, as with experts that none of its tokens reached. What the forget set "
            f"changed there goes by the method's formula; to keep it, --exclude '{left[0]}'."
        )


def _forget_share(method: Edit, inputs: EditInputs) -> float:
    forget, retain = inputs.forget_importance, inputs.retain_importance
    if not method.needs.set_sizes or forget is None or retain is None:
        return 0.5
    return share_of_examples(forget, retain)


def check_effect(summaries: Sequence[TensorSummary], editor: Editor, inputs: EditInputs) -> None:
    """Stop at an edit that would report forgetting where none happened."""
    method = editor.blocks.method
    if not any(summary.task_vector_norm for summary in summaries):
        raise _no_direction(method, inputs)
    if method.needs.importance and not any(summary.mean_weighting for summary in summaries):
        cure = " Lower its setting `selection`." if method.direction == "full" else ""
        raise CheckpointError(
            f"`{method.name}` gives every weight the share 0, so the edit would forget nothing; "
            f"{inputs.forget_importance} shows no weight that matters to the forget set.{cure}"
        )


def _no_direction(method: Edit, inputs: EditInputs) -> CheckpointError:
    if method.direction != "forget - base":
        return CheckpointError(
            f"{inputs.full} equals {inputs.base} in every tensor to edit, so the edit would change "
            "nothing. Give the model before it saw the data as --base."
        )
    if len(inputs.forget_checkpoints) > 1:
        return CheckpointError(
            f"`{method.name}` leaves nothing of {len(inputs.forget_checkpoints)} task vectors: the "
            "forget checkpoints equal the base, or agree nowhere. Tune them with a higher learning "
            "rate, or give fewer."
        )
    return CheckpointError(
        f"{inputs.forget_checkpoints[0]} equals {inputs.base} in every tensor to edit, so the edit "
        "would forget nothing. Tune the base on the forget set with `perta finetune`, with a "
        "learning rate high enough to change the stored values."
    )


def edit_all(editor: Editor, sink: Sink, advance: Callable[[], None]) -> tuple[TensorSummary, ...]:
    """Give a sink every tensor, in threads; `advance` is called once for each that is finished."""
    return everywhere(edit_share, editor, sink, Own(advance))


def edit_share(
    editor: Editor, sink: Sink, advance: Own[Callable[[], None]]
) -> tuple[TensorSummary, ...]:
    """`edit_all` for this process's share of the tensors."""
    targets, span = editor.targets, editor.blocks.chunk * SPAN_CHUNKS
    left = [math.ceil(target.full.numel / span) for target in targets]
    parts, lock = dict[tuple[int, int], Sums](), threading.Lock()

    def finish(place: tuple[int, int], sums: Sums) -> None:
        with lock:
            parts[place] = sums
            left[place[0]] -= 1
            if not left[place[0]] and advance.value:
                advance.value()

    def work(job: Span, buffers: Buffers) -> None:
        sums = editor.run(sink, targets[job.target], job.start, job.stop, buffers)
        finish((job.target, job.part), sums)

    in_threads(share([*spans(targets, span)]), work, editor.blocks.chunk, editor.workers)
    for others in gathered(parts)[1:]:
        for place, sums in others.items():
            finish(place, sums)
    return _summaries(targets, parts)


def _summaries(
    targets: Sequence[Target], parts: Mapping[tuple[int, int], Sums]
) -> tuple[TensorSummary, ...]:
    """Of every edited tensor, in the order of the files, whatever the threads did."""
    totals: dict[int, Sums] = {}
    for target, part in sorted(parts):
        totals.setdefault(target, Sums()).add(parts[target, part])
    return tuple(
        TensorSummary(
            name=target.full.name,
            elements=target.full.numel,
            mean_weighting=sums.weighting / target.full.numel,
            task_vector_norm=math.sqrt(sums.task_vector),
            **vars(sums.stored(target.full.numel)),
        )
        for index, target in enumerate(targets)
        if target.sources and target.alias_of is None and (sums := totals.get(index))
    )
