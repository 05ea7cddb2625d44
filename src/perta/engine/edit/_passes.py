"""Passes over the inputs before the edit, for what no single chunk can know.

Averages of importance over rows or tensors, and the smallest score that is kept of a ranking of
all weights. Both need memory for their results alone, whatever the size of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

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
    """Mean importance of every output unit or tensor, where the granularity asks for it.

    Args:
        targets: the plan.
        weighting: its granularity is used.
        transposed: θ_full's names of the matrices whose output units are columns.
        chunk: elements worked on at once.
        worker_count: number of threads.

    Returns:
        Role -> θ_full's name -> averages; empty for the granularity `element`. An output unit is a
        slice along the first dimension, of a transposed matrix along the second; vectors have
        units of one element and stay as they are.
    """
    averages: dict[str, dict[str, Averages]] = {FORGET_IMPORTANCE: {}, RETAIN_IMPORTANCE: {}}
    jobs = []
    for target in targets:
        is_tensor = weighting.granularity == "tensor"
        by_column = not is_tensor and (target.alias_of or target.full.name) in transposed
        for role in averages:
            rows = target.full.shape[0] if len(target.full.shape) > 1 else target.full.numel
            rows = 1 if is_tensor else rows
            if role in target.sources and target.alias_of is None and rows < target.full.numel:
                jobs.append((role, target, rows, by_column))
    if weighting.granularity == "element":
        return {}

    def work(job: tuple[str, Target, int, bool], buffers: Buffers) -> None:
        role, target, rows, by_column = job
        with opened(target.sources[role].file) as descriptor:
            reader = Reader(target.sources[role], descriptor, role, buffers)
            values = _average(reader, rows, by_column, chunk)
            averages[role][target.full.name] = Averages(values, by_column)

    in_threads(jobs, work, chunk, worker_count)
    return averages


def _average(reader: Reader, rows: int, by_column: bool, chunk: int) -> Tensor:
    """Mean of every row or column, float32, summed in float64 in the order of the file."""
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
    return _as_stored(sums / (rows if by_column else length), reader)


def _as_stored(averages: Tensor, reader: Reader) -> Tensor:
    """Averages in float64 where the importance is stored so, else in float32."""
    wide = reader.entry.dtype == torch.float64
    return averages if wide else averages.to(torch.float32)


def find_unused(targets: Iterable[Target], chunk: int, worker_count: int) -> dict[str, Target]:
    """Tensors, by name, that no retained example depends on, while the forget set does.

    Their importance was measured and is 0 throughout, as of experts that no retained token reached.
    Nearly all others show it by their first numbers.
    """
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
    are, so one pass counts the upper half of the bits, which finds that of the k-th largest, and
    a second pass counts the lower half of the scores that share it. Scores equal to the k-th
    largest are all kept; scores of 0 never are.
    """
    if not blocks.method.ranks:
        return ()
    ranked = [target for target in targets if target.sources and target.alias_of is None]
    elements = sum(target.full.numel for target in ranked)
    wanted = max(1, round(blocks.method.keep * elements))
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


@dataclass
class _Histograms:
    """Counts half of the bits of every score; from all threads, whatever their order.

    `halves` has, for each ranking, the upper half whose lower halves are counted; without it, upper
    halves are. `counts` are 65536 bins each.
    """

    blocks: Blocks
    halves: Sequence[int] | None = None
    counts: list[Tensor] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, target: Target, span: Span, buffers: Buffers) -> None:
        """Count the scores of one span."""
        with self.blocks.opened(target, target.sources, buffers) as readers:
            for begin in range(span.start, span.stop, self.blocks.chunk):
                count = min(self.blocks.chunk, span.stop - begin)
                vectors = self.blocks.task_vectors(readers, begin, count)
                block = self.blocks.block(target, readers, begin, count)
                self._add(self.blocks.method.scores(vectors, block))

    def _add(self, scores: Sequence[Tensor]) -> None:
        found = []
        for place, values in enumerate(scores):
            # The sign of a NaN, which the edit will find, must not become a negative bin.
            bits = values.view(torch.int32) & 0x7FFFFFFF
            if self.halves is not None:
                bits = bits[bits >> 16 == self.halves[place]] & 0xFFFF
            else:
                bits >>= 16
            found.append(torch.bincount(bits, minlength=1 << 16))
        with self.lock:
            if not self.counts:
                self.counts = found
            else:
                for total, more in zip(self.counts, found, strict=True):
                    total.add_(more)


def _count(
    blocks: Blocks, halves: Sequence[int] | None, targets: list[Target], worker_count: int
) -> list[Tensor]:
    histograms = _Histograms(blocks, halves)

    def work(span: Span, buffers: Buffers) -> None:
        histograms.run(targets[span.target], span, buffers)

    own = share([*spans(targets, blocks.chunk * SPAN_CHUNKS)])
    in_threads(own, work, blocks.chunk, worker_count)
    found = [counts for counts in gathered(histograms.counts) if counts]
    return [torch.stack(of_all).sum(0) for of_all in zip(*found, strict=True)]
