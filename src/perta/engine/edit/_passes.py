"""Passes over the inputs before the edit, for what no single chunk can know.

Averages of importance over rows or tensors, and the smallest score that is kept of a ranking of
all weights. Both need memory for their results alone, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from perta.engine.edit._chunks import (
    SPAN_CHUNKS,
    Averages,
    Blocks,
    Buffers,
    Reader,
    Span,
    in_threads,
    read_importance,
    spans,
)
from perta.engine.edit.plan import FORGET_IMPORTANCE, RETAIN_IMPORTANCE, Target
from perta.options import WeightingConfig
from perta.parallel import everywhere, gathered, share
from perta.store.checkpoint import opened


def average_importance(
    targets: Iterable[Target],
    weighting: WeightingConfig,
    transposed: Collection[str],
    chunk: int,
    worker_count: int,
) -> dict[str, dict[str, Averages]]:
    """Role -> θ_full's name -> mean importance of each unit; empty for the granularity `element`.

    A unit is the tensor or an output unit: a slice along the first dimension, of matrices in
    `transposed` along the second. Vectors have units of one element and stay as they are.
    """
    averages: dict[str, dict[str, Averages]] = {FORGET_IMPORTANCE: {}, RETAIN_IMPORTANCE: {}}
    if weighting.granularity == "element":
        return {}
    jobs, is_tensor = [], weighting.granularity == "tensor"
    for target in targets:
        entry = target.full
        rows = 1 if is_tensor else entry.shape[0] if len(entry.shape) > 1 else entry.numel
        if target.alias_of is None and rows < entry.numel:
            by_column = not is_tensor and entry.name in transposed
            jobs += [(r, target, rows, by_column) for r in averages if r in target.sources]

    def work(job: tuple[str, Target, int, bool], buffers: Buffers) -> None:
        role, target, rows, by_column = job
        with opened(target.sources[role].file) as descriptor:
            reader = Reader(target.sources[role], descriptor, role, buffers)
            values = _average(reader, rows, by_column, chunk)
            averages[role][target.full.name] = Averages(values, by_column)

    in_threads(jobs, work, chunk, worker_count)
    return averages


def _average(reader: Reader, rows: int, by_column: bool, chunk: int) -> Tensor:
    """Mean of every row or column, summed in float64 in the order of the file."""
    elements = reader.entry.numel
    length = elements // rows
    sums = torch.zeros(length if by_column else rows, dtype=torch.float64)
    begin = 0
    while begin < elements:
        place = begin % length
        if length <= chunk:
            count = min(chunk // length * length, elements - begin)
        else:
            count = min(chunk, length - place)
        values = read_importance(reader, begin, count).view(-1, min(length, count))
        first = place if by_column else begin // length
        parts = values.sum(0 if by_column else 1, dtype=torch.float64)
        sums[first : first + len(parts)] += parts
        begin += count
    averages = sums / (rows if by_column else length)
    return averages if reader.entry.dtype == torch.float64 else averages.to(torch.float32)


def find_unused(targets: Iterable[Target], chunk: int, worker_count: int) -> dict[str, Target]:
    """Tensors whose importance is 0 throughout on the retain set, and on the forget set is not."""
    found: dict[str, Target] = {}

    def is_silent(target: Target, role: str, buffers: Buffers) -> bool:
        with opened(target.sources[role].file) as descriptor:
            reader = Reader(target.sources[role], descriptor, role, buffers)
            size = reader.entry.numel
            return not any(
                read_importance(reader, begin, min(chunk, size - begin)).any()
                for begin in range(0, size, chunk)
            )

    def work(target: Target, buffers: Buffers) -> None:
        retain = is_silent(target, RETAIN_IMPORTANCE, buffers)
        if retain and not is_silent(target, FORGET_IMPORTANCE, buffers):
            found[target.full.name] = target

    both = {FORGET_IMPORTANCE, RETAIN_IMPORTANCE}
    jobs = [target for target in targets if target.alias_of is None and both <= set(target.sources)]
    in_threads(jobs, work, chunk, worker_count)
    return found


def find_cuts(targets: Sequence[Target], blocks: Blocks, worker_count: int) -> tuple[float, ...]:
    """Smallest score that is kept of each ranking, for a method that keeps the largest of all.

    The k-th largest of n scores, exactly: non-negative float32 numbers are ordered as their bits
    are, so one pass counts the upper half of the bits, which finds that of the k-th largest, and a
    second pass counts the lower half of the scores that share it. Ties are kept; 0 never is.
    """
    if not blocks.method.ranks:
        return ()
    ranked = [target for target in targets if target.sources and target.alias_of is None]
    wanted = max(1, round(blocks.method.keep * sum(target.full.numel for target in ranked)))
    upper = everywhere(_count, blocks, None, ranked, worker_count)
    found = [_from_the_top(counts, wanted) for counts in upper]
    lower = everywhere(_count, blocks, [half for half, _ in found], ranked, worker_count)
    cuts = []
    for (half, above), counts in zip(found, lower, strict=True):
        rest, _ = _from_the_top(counts, wanted - above)
        bits = torch.tensor(max(1, (half << 16) + rest), dtype=torch.int32)
        cuts.append(float(bits.view(torch.float32)))
    return tuple(cuts)


def _from_the_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the k-th largest lies, and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above


def _count(
    blocks: Blocks, halves: Sequence[int] | None, targets: list[Target], worker_count: int
) -> list[Tensor]:
    """For each ranking 65536 counts of upper halves of bits, or of lower ones under `halves`."""
    counts, lock, chunk = list[Tensor](), threading.Lock(), blocks.chunk

    def work(span: Span, buffers: Buffers) -> None:
        target = targets[span.target]
        with blocks.opened(target, target.sources, buffers) as readers:
            for begin in range(span.start, span.stop, chunk):
                count = min(chunk, span.stop - begin)
                vectors = blocks.task_vectors(readers, begin, count)
                scores = blocks.method.scores(vectors, blocks.block(target, readers, begin, count))
                found = [_bins(s, halves[i] if halves else None) for i, s in enumerate(scores)]
                with lock:
                    # From all threads, whatever their order.
                    counts[:] = map(torch.add, counts, found) if counts else found

    in_threads(share([*spans(targets, chunk * SPAN_CHUNKS)]), work, chunk, worker_count)
    gained = [theirs for theirs in gathered(counts) if theirs]
    return [torch.stack(of_all).sum(0) for of_all in zip(*gained, strict=True)]


def _bins(scores: Tensor, half: int | None) -> Tensor:
    # The sign of a NaN, which the edit will find, must not become a negative bin.
    bits = scores.view(torch.int32) & 0x7FFFFFFF
    bits = bits >> 16 if half is None else bits[bits >> 16 == half] & 0xFFFF
    return torch.bincount(bits, minlength=1 << 16)
