"""Several processes and one program: process 0 runs it, and the others help where it asks.

    torchrun --nproc-per-node 4 -m perta unlearn …

    process 0    the program ── everywhere(f, model, rows) ── the program ── …
    the others   wait ───────── f(model, rows) ────────────── wait ───────── …

Process 0 alone looks, hashes, decides, writes and prints, so no stage knows how many processes
there are. A long computation is called `everywhere`: what it takes is sent, models with their
weights, and every process calls it. There, `share` gives each its part of the work, and `summed`
and `gathered` bring the parts together; outside, a process has all of the work and nothing to add.

Every process must come to the same `summed`s in the same order, so whatever decides about them has
to be the same everywhere: an argument, or what `summed` returned.
"""

from __future__ import annotations

import copyreg
import io
import logging
import math
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from perta.errors import PertaError
from perta.progress import console, warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_T = TypeVar("_T")
_P = ParamSpec("_P")

_GRACE = 5.0
"""Seconds after an error in which the others may come to one as well; then they are waiting for
this process, and learn that it is gone."""
_FAREWELL = 20.0  # seconds that process 0 has to tell the user about an error of another one
_LEFT = ("_require_grads_hook", "_gradient_checkpointing_func")
"""What transformers leaves in a model that was trained."""
_LARGE = 1 << 16  # bytes from which the values of a tensor are sent by themselves


def lead(program: Callable[[], object]) -> None:
    """Run a program: on process 0 of torchrun's several, with the others at hand, or by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        program()
        return
    world = _join()
    if world.rank:
        world.serve()
        return
    try:
        program()
    finally:
        world.dismiss()


@dataclass(frozen=True)
class Own(Generic[_T]):
    """An argument for process 0 alone, such as a callback: the others get None."""

    value: _T | None

    def __reduce__(self) -> tuple[Any, ...]:
        return Own, (None,)


def everywhere(function: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    """Call a module's function on every process with the same arguments; what process 0 returned.

    The others get copies, of models those of their weights. In another such call, process by
    process. PertaError where a process is gone; an error on any of them is raised as if our own.
    """
    with _calling(function, args, named):
        return function(*args, **named)


def stream(
    function: Callable[_P, Iterator[_T]], *args: _P.args, **named: _P.kwargs
) -> Iterator[_T]:
    """`everywhere` for a generator; yields what process 0 yields."""
    with _calling(function, args, named):
        yield from function(*args, **named)


def wherever(
    function: Callable[Concatenate[nn.Module, _P], _T],
    model: nn.Module,
    *args: _P.args,
    **named: _P.kwargs,
) -> _T:
    """Call a function of a model: `everywhere` where each process has its part of it, else here."""
    call = everywhere if is_part(model) else _here
    return call(function, model, *args, **named)


def _here(function: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    return function(*args, **named)


def keep_part(model: nn.Module | None) -> None:
    """Keep this process's part of a model, for calls `everywhere` with it; None lets it go."""
    global _part
    _part = model


def is_part(model: nn.Module) -> bool:
    """Whether of a model each process has its part alone, so that all make a pass together."""
    return model is _part


def _own_part() -> nn.Module | None:
    return _part


def share(items: Sequence[_T]) -> Sequence[_T]:
    """This process's part of some work: every N-th item."""
    if _world is None or not _world.sharing:
        return items
    return items[_world.rank :: _world.size]


def in_step(items: Sequence[_T]) -> Iterator[tuple[_T, bool]]:
    """This process's part, and whether an item is of it; one that has less goes along with another.

    So all take as many steps, and may need each other in each, as a divided model's processes do.
    """
    for first in range(0, len(items), count()):
        at = first + place()
        yield items[min(at, len(items) - 1)], at < len(items)


def turns(model: nn.Module, items: Sequence[_T]) -> Iterator[tuple[_T, bool]]:
    """This process's part of some passes through a model, and True; of one in parts `in_step`."""
    return in_step(items) if is_part(model) else ((item, True) for item in share(items))


@contextmanager
def in_company(model: nn.Module, go_along: Callable[[], object]) -> Iterator[None]:
    """Let each process make as many passes as it needs, of a model in parts too.

    Before each the processes ask whether any is to come; one that is done goes along with it.
    """
    if not is_part(model):
        yield
        return
    import torch

    def announced(passes: int) -> bool:
        return bool(summed(torch.tensor(passes)))

    def announce(*_: object) -> None:
        announced(1)

    with model.register_forward_pre_hook(announce, prepend=True):  # before what gathers weights
        yield
    while announced(0):
        go_along()


def portion(most: int, items: int) -> int:
    """How many of some items to take at a time, at most `most`, so that each process has some."""
    return min(most, max(1, math.ceil(items / count())))


def place() -> int:
    """Number of this process among those of the present call, from 0."""
    return _world.rank if _world and _world.sharing else 0


def count() -> int:
    """Number of processes in the present call."""
    return _world.size if _world and _world.sharing else 1


def helpers() -> int:
    """Number of the other processes that a call made `everywhere` from here would reach."""
    return _world.size - 1 if _world and not (_world.rank or _world.sharing or _world.lost) else 0


def summed(values: Tensor) -> Tensor:
    """Add up a tensor over the processes, in place; each has the sum."""
    if count() == 1 or not values.numel():
        return values
    import torch.distributed as dist

    dense = values.contiguous()
    with _connected():
        dist.all_reduce(dense)
    return values if dense is values else values.copy_(dense)


def gathered(value: _T) -> list[_T]:
    """The values of all processes in their order; on the others their own alone."""
    if _world is None or not _world.sharing:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _world.size
    with _connected():
        dist.gather_object(value, None if _world.rank else found)
    return [value] if _world.rank else found


def told(value: _T) -> _T:
    """The value of process 0, on every process."""
    if _world is None or not _world.sharing:
        return value
    if _world.rank:
        received: _T = _world.receive()
        return received
    _world.send(*_packed(value))
    return value


@contextmanager
def alone() -> Iterator[None]:
    """Let what is done here know of no other process."""
    before = _world.sharing if _world else False
    if _world:
        _world.sharing = False
    try:
        yield
    finally:
        if _world:
            _world.sharing = before


# --- the processes ------------------------------------------------------------------------------


class _LostError(Exception):
    """Another process does not answer any more."""


@dataclass
class _World:
    """The processes of a run."""

    rank: int  # number of this one
    size: int  # how many there are
    store: Any  # where they leave notes for each other
    calls: int = 0  # made everywhere so far
    sharing: bool = False  # whether the present call is made everywhere
    lost: bool = False  # whether they can no longer meet

    def serve(self) -> None:
        """Make the calls that process 0 asks for until the run is over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # Process 0 says all that there is to say.
        console.quiet = True
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        with suppress(_LostError), _connected():
            while not self.lost and self._wait(f"call {self.calls + 1}", "over") != "over":
                # Process 0 is told of errors, and says so.
                with suppress(BaseException):
                    self._serve_call()
            self._wait("over", seconds=_FAREWELL)
            if not self.lost:
                self.store.set(f"left {self.rank}", "")
                self._abandon()
                return
        sys.exit(1)

    def dismiss(self) -> None:
        """Let the others go; where the notes are here, they need them to know."""
        # All is done or cleaned up, and torchrun ends whom another's end leaves over.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.store.set("over", "")
        for rank in range(1, self.size):
            self._wait(f"left {rank}", seconds=0 if self.lost else _GRACE)
        self._abandon()

    def _serve_call(self) -> None:
        import torch

        self.calls += 1
        with self.together():
            function, args, named, threads = self.receive()
            torch.set_num_threads(threads)
            made = function(*args, **named)
            if isinstance(made, Iterator):
                for _ in made:
                    pass

    @contextmanager
    def together(self) -> Iterator[None]:
        """One call that every process makes, and what came of it."""
        self.sharing, error = True, None
        try:
            yield
        except BaseException as raised:
            error = _LostError(str(raised)) if _is_of_network(raised) else raised
            raise
        finally:
            self.sharing = False
            self._settle(error)

    def _settle(self, error: BaseException | None) -> None:
        """Tell how a call ended here, learn how elsewhere; another's error is raised."""
        key = f"call {self.calls} on "
        self.store.set(f"{key}{self.rank}", pickle.dumps(_portable(error)))
        # Who is gone without a note leaves none any more.
        grace = 0.0 if isinstance(error, (_LostError, KeyboardInterrupt)) else _GRACE
        until = math.inf if error is None else time.monotonic() + grace
        ended = []
        for rank in range(self.size):
            if self._wait(f"{key}{rank}", seconds=until - time.monotonic()):
                ended.append(pickle.loads(self.store.get(f"{key}{rank}")))
        if len(ended) < self.size:
            self._abandon()
        if error is not None and not isinstance(error, (_LostError, KeyboardInterrupt)):
            return
        reason = next((e for e in ended if e and not isinstance(e, _LostError)), None)
        if reason is not None:
            raise reason from error
        if isinstance(error, _LostError):
            raise PertaError(
                "A process of this run is gone: it was killed, or its machine was. Nothing was "
                "left half-written; run the same command again, with --traceback to see what the "
                "network says."
            ) from error

    def _wait(self, *keys: str, seconds: float = math.inf) -> str | None:
        """The first of some notes that is there; None where none comes in time."""
        until, pause = time.monotonic() + seconds, 0.001
        try:
            while True:
                for key in keys:
                    if self.store.check([key]):
                        return key
                if time.monotonic() >= until:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
        except KeyboardInterrupt:
            self._abandon()
            raise

    def send(self, data: bytes, storages: Sequence[torch.UntypedStorage]) -> None:
        """Give every process what was packed."""
        import torch.distributed as dist

        with _connected():
            sizes = [(each.nbytes(), each.device.type) for each in storages]
            dist.broadcast_object_list([data, sizes])
            for each in storages:
                dist.broadcast(_as_bytes(each), 0)

    def receive(self) -> Any:
        """What process 0 sends."""
        import torch
        import torch.distributed as dist

        with _connected():
            head: list[Any] = [None, None]
            dist.broadcast_object_list(head)
            storages = [torch.UntypedStorage(size, device=device) for size, device in head[1]]
            for each in storages:
                dist.broadcast(_as_bytes(each), 0)
        return _Unpacker(head[0], storages).load()

    def _abandon(self) -> None:
        """Part, so that no other waits for this process."""
        import torch.distributed as dist

        if not self.lost:
            self.lost = True
            dist.destroy_process_group()


_world: _World | None = None
_part: nn.Module | None = None


def _join() -> _World:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    global _world
    store, rank, size = next(iter(rendezvous("env://")))
    gpu = ""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
        torch.cuda.set_device(local)
        gpu = str(torch.cuda.get_device_properties(local).uuid)
    store.set(f"gpu {rank}", gpu)
    gpus = {store.get(f"gpu {other}") for other in range(size)}
    # NCCL refuses a GPU that is another process's too; gloo sends its tensors through the CPU.
    own_gpus = len(gpus) == size and b"" not in gpus
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        # Process 0 may write for hours what it gets; who is gone is noticed without a clock.
        timeout=timedelta(days=1),
    )
    _world = _World(rank, size, PrefixStore("perta", store))
    return _world


@contextmanager
def _calling(function: Callable[..., Any], args: Any, named: Any) -> Iterator[None]:
    """Have the other processes make a call while it is made here."""
    if _world is None or _world.rank or _world.sharing or _world.lost:
        with alone():
            yield
        return
    import torch

    try:
        packed = _packed((function, args, named, torch.get_num_threads()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        warn(f"Process 0 works alone here, for it cannot send what it works on: {error}")
        yield
        return
    _world.calls += 1
    _world.store.set(f"call {_world.calls}", "")
    with _world.together():
        _world.send(*packed)
        yield


@contextmanager
def _connected() -> Iterator[None]:
    """Tell an error of the connection from all others."""
    try:
        yield
    except RuntimeError as error:
        raise _LostError(str(error)) from error


def _is_of_network(error: BaseException) -> bool:
    """Whether PyTorch could not reach another process, in operations of its own."""
    import torch.distributed as dist

    lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return lost and isinstance(error, RuntimeError)


def _portable(error: BaseException | None) -> BaseException | None:
    """An error as other processes can be told of it."""
    if error is None or isinstance(error, _LostError):
        return error and _LostError(str(error))
    if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return _LostError("interrupted")
    if isinstance(error, PertaError):
        return type(error)(str(error))
    return RuntimeError("".join(format_exception(error)))


# --- what is sent -------------------------------------------------------------------------------


def _packed(value: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    """A value as bytes, and the large storages of its tensors."""
    buffer = io.BytesIO()
    packer = _Packer(buffer)
    packer.dump(value)
    return buffer.getvalue(), packer.storages


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Packer(pickle.Pickler):
    """Pickles without the values of large tensors, and modules without their hooks.

    A hook looks at what one process does, and is often a function that has no name elsewhere. So is
    what recomputes activations. In place of a module in parts each process finds its own.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.storages: list[torch.UntypedStorage] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype] | None:
        """Number and type of a storage that is sent by itself."""
        from torch.storage import TypedStorage

        if not isinstance(obj, TypedStorage):
            return None
        storage = obj._untyped_storage
        if storage.device.type == "cpu" and storage.nbytes() < _LARGE:
            return None
        place = self._places.setdefault(storage.data_ptr(), len(self.storages))
        if place == len(self.storages):
            self.storages.append(storage)
        return place, obj.dtype

    def reducer_override(self, obj: Any) -> Any:
        """How a module is taken apart."""
        from torch import nn

        if not isinstance(obj, nn.Module):
            return NotImplemented
        if is_part(obj):
            return _own_part, ()
        own = {k: v for k, v in vars(obj).items() if k not in _LEFT}
        kept = {k: type(v)() if "_hooks" in k else v for k, v in own.items()}
        return copyreg.__newobj__, (type(obj),), kept  # type: ignore[attr-defined]


class _Unpacker(pickle.Unpickler):
    """Inverse of `_Packer`."""

    def __init__(self, data: bytes, storages: Sequence[torch.UntypedStorage]) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def persistent_load(self, pid: tuple[int, torch.dtype]) -> Any:
        """The storage of that number."""
        from torch.storage import TypedStorage

        return TypedStorage(wrap_storage=self._storages[pid[0]], dtype=pid[1], _internal=True)
