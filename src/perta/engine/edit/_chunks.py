"""Chunks of stored tensors: read through reused buffers, by threads, and checked.

A chunk is small enough to stay in a core's cache while it is worked on, and buffers are reused,
so memory depends on the number of threads alone, not on the model or its largest tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from perta.engine.edit.plan import BASE, DIRECTION, FULL, IMPORTANCE_ROLES, Target, forget_role
from perta.errors import CorruptCheckpointError
from perta.methods.method import Block, Edit, Side
from perta.models.formats.low_rank import ThinEntry, read_thin
from perta.options import WeightingConfig
from perta.store.arithmetic import difference, square_norm
from perta.store.checkpoint import TensorEntry, is_float, opened, read_into
from perta.temporary import temporarily

CHUNK = 1 << 18
"""Elements worked on at once: few enough for the caches, enough that threads seldom meet at the
interpreter's lock."""

SPAN_CHUNKS = 16
"""Chunks that a thread takes at a time: enough to make opening files and handing out work free,
few enough that no thread is left alone with much work at the end."""

_INFINITY_BITS = 0x7F800000
_Job = TypeVar("_Job")


@dataclass(frozen=True)
class Span:
    """Neighbouring elements of one tensor, worked on by one thread in one go."""

    target: int
    part: int
    start: int
    stop: int


def spans(targets: list[Target], length: int) -> Iterator[Span]:
    """Cut every tensor into spans of at most `length` elements."""
    for index, target in enumerate(targets):
        for part, start in enumerate(range(0, target.full.numel, length)):
            yield Span(index, part, start, min(start + length, target.full.numel))


class Buffers:
    """Reused memory of one thread: few buffers, so that all of them stay in its cache."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._slots: dict[str, Tensor] = {}

    def raw(self, role: str, dtype: torch.dtype) -> Tensor:
        """Room for a chunk as stored, (chunk,), which those share that are converted at once."""
        converted = role not in (BASE, FULL) and dtype != torch.float32
        slot = "converted" if converted else f"raw {role}"
        return self._slot(slot, self._chunk * dtype.itemsize).view(dtype)

    def floats(self, role: str) -> Tensor:
        """Room for a chunk as float32, (chunk,)."""
        return self._slot(f"float32 {role}", self._chunk * 4).view(torch.float32)

    def _slot(self, name: str, nbytes: int) -> Tensor:
        if name not in self._slots or self._slots[name].numel() < nbytes:
            self._slots[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self._slots[name][:nbytes]


class Reader:
    """Chunks of one tensor; `raw` is the last one as stored, (count,), and `stored` its bytes."""

    def __init__(self, entry: TensorEntry, descriptor: int, role: str, buffers: Buffers) -> None:
        self.entry = entry
        self._descriptor = descriptor
        self._room = buffers.raw(role, entry.dtype)
        self._is_kept = entry.dtype == torch.float32 or not is_float(entry)
        self._float_room = self._room if self._is_kept else buffers.floats(role)
        self._fit(self._room.numel())

    def _fit(self, count: int) -> None:
        """Cut the views to a chunk; only the last chunk of a span has another length."""
        self._count = count
        self.raw = self._room[:count]
        self.stored = self.raw.view(torch.uint8).numpy().data
        self._floats = self._float_room[:count]

    def load(self, begin: int, count: int) -> Tensor:
        """Read a chunk as stored."""
        if count != self._count:
            self._fit(count)
        offset = self.entry.offset + begin * self.entry.dtype.itemsize
        read_into(self._descriptor, offset, self.stored, self.entry)
        return self.raw

    def read(self, begin: int, count: int) -> Tensor:
        """Read a chunk; as float32 if it is of a floating type, otherwise as stored."""
        values = self.load(begin, count)
        return values if self._is_kept else self._floats.copy_(values)

    def read_difference(self, base: Tensor, begin: int, count: int) -> Tensor:
        """Read a chunk, less one of the base as stored; float32."""
        return difference(self.load(begin, count), base, self._floats)

    def check_copy(self, begin: int, count: int) -> None:
        """Stop if the chunk last read is not finite."""
        if is_float(self.entry) and not math.isfinite(square_norm(self._floats)):
            self.check(begin, count)

    def check(self, begin: int, count: int) -> None:
        """Read a chunk again and stop if it is not finite."""
        if not bool(torch.isfinite(self.read(begin, count)).all()):
            raise not_finite(self.entry)


class _StepReader(Reader):
    """Chunks of a step that is kept as two factors, float32; its base is not looked at."""

    def __init__(self, entry: ThinEntry) -> None:
        self.entry = entry
        self._thin = read_thin(entry)

    def read(self, begin: int, count: int) -> Tensor:
        """Make a chunk of the step."""
        return self._thin.part(begin, count)


Readers = Mapping[str, Reader]  # role -> reader


def steps_from_base(readers: Readers, roles: Iterable[str], begin: int, count: int) -> list[Tensor]:
    """A chunk of what each of some models differs by from the base, if that is read; float32."""
    steps: list[Tensor] = []
    base = None
    for reader in map(readers.__getitem__, roles):
        if BASE not in readers or isinstance(reader, _StepReader):
            steps.append(reader.read(begin, count))
        else:
            base = readers[BASE].load(begin, count) if base is None else base
            steps.append(reader.read_difference(base, begin, count))
    return steps


def read_importance(reader: Reader, begin: int, count: int) -> Tensor:
    """Read and check a chunk of importance; float64 if stored so (high orders), else float32."""
    if reader.entry.dtype == torch.float64:
        values = reader.load(begin, count).clone()  # the buffer is for what is converted at once
    else:
        values = reader.read(begin, count)
    _check_importance(values, reader)
    return values


def _check_importance(values: Tensor, reader: Reader) -> None:
    # As unsigned integers the bits of finite non-negative numbers lie below those of infinity, and
    # those of NaN and negative numbers above: one pass instead of two, and a faster one.
    if values.dtype == torch.float32 and int(values.numpy().view(np.uint32).max()) < _INFINITY_BITS:
        return
    low, high = torch.aminmax(values)
    if float(low) < 0:
        raise CorruptCheckpointError(
            f"{reader.entry.file}: {reader.entry.name} holds a negative value ({float(low):g}), so "
            "it is not an importance. Make it again with `perta importance`."
        )
    if not (float(low) >= 0 and float(high) < math.inf):
        raise not_finite(reader.entry)


def not_finite(entry: TensorEntry) -> CorruptCheckpointError:
    """The error for a weight that is damaged."""
    return CorruptCheckpointError(
        f"{entry.file}: {entry.name} holds NaN or Inf, which the edit would spread. Make the "
        "file again; if a training run diverged, lower its learning rate."
    )


@dataclass(frozen=True)
class Averages:
    """Importance averaged over rows, or `by_column`, of a tensor: one float32 value for each."""

    values: Tensor
    by_column: bool = False

    def spread(self, elements: int, begin: int, count: int) -> Tensor:
        """The values repeated over a chunk, (count,), of a tensor of so many elements in all."""
        places = torch.arange(begin, begin + count)
        units = len(self.values)
        return self.values[places % units if self.by_column else places // (elements // units)]


@dataclass(frozen=True)
class Blocks:
    """Makes of stored chunks what a method looks at."""

    method: Edit
    weighting: WeightingConfig  # the user's settings, with the method's defaults filled in
    chunk: int  # elements worked on at once
    # Role -> name -> importance averaged over units or the tensor; empty where importance is used
    # element by element.
    averages: Mapping[str, Mapping[str, Averages]] = field(default_factory=dict)
    forget_share: float = 0.5  # share of the examples of both sets that belongs to the forget set
    cuts: tuple[float, ...] = ()  # smallest scores kept, for methods that rank weights

    @contextmanager
    def opened(self, target: Target, roles: Iterable[str], buffers: Buffers) -> Iterator[Readers]:
        """Open some of the tensors that a target is computed from; yields role -> reader."""
        averaged = {role for role, means in self.averages.items() if target.full.name in means}
        entries = {FULL: target.full, **target.sources}
        with ExitStack() as stack:

            def reader(role: str, entry: TensorEntry) -> Reader:
                if isinstance(entry, ThinEntry):
                    return _StepReader(entry)
                return Reader(entry, stack.enter_context(opened(entry.file)), role, buffers)

            yield {role: reader(role, entries[role]) for role in roles if role not in averaged}

    def task_vectors(self, readers: Readers, begin: int, count: int) -> list[Tensor]:
        """What the method combines: every τ, or what takes its place; each in its own buffer."""
        if DIRECTION in readers:
            return [readers[DIRECTION].read(begin, count)]
        roles: list[str] = []
        while (role := forget_role(len(roles))) in readers:
            roles.append(role)
        return steps_from_base(readers, roles, begin, count)

    def block(self, target: Target, readers: Readers, begin: int, count: int) -> Block:
        """Importance and settings of a chunk."""
        settings, name = self.weighting, target.alias_of or target.full.name
        importance: dict[Side, Tensor] = {}
        for side in self.method.needs.importance:
            role = IMPORTANCE_ROLES[side]
            if role in readers:
                importance[side] = read_importance(readers[role], begin, count)
            else:
                importance[side] = self.averages[role][name].spread(target.full.numel, begin, count)
        return Block(
            **importance,
            place=(settings.weighting_seed, name, begin),
            cuts=self.cuts,
            forget_share=self.forget_share,
        )


def in_threads(
    jobs: Iterable[_Job], work: Callable[[_Job, Buffers], None], chunk: int, worker_count: int
) -> None:
    """Work off jobs in threads; the first error, or an interrupt, stops all of them."""
    waiting, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def loop() -> None:
        buffers = Buffers(chunk)
        try:
            while not stop.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                work(job, buffers)
        finally:
            # After an error nobody needs the rest; after the last job there is none.
            stop.set()

    # Torch must start no threads of its own inside ours.
    alone = temporarily(torch.set_num_threads, 1, torch.get_num_threads())
    with alone, ThreadPoolExecutor(worker_count, "edit") as pool:
        futures = [pool.submit(loop) for _ in range(worker_count)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
