"""What each of several processes computes and sends, and what a process holds: no clock, no GPU.

    python benchmarks/scale.py [--sizes 1 2 4 8] [--peaks 1B 8B 70B]

Operations are those that PyTorch's own counter sees, bytes those of the tensors handed to gloo, in
multiples of the weights; both of the process that has most. Strong: the same rows whatever the
number of processes, weak: as many rows a process. Peaks are of one step in memory that is only
counted (fake tensors), at the sizes of Llama 3, with the operations that a GPU would get; a table
of the page is printed for each part.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from perta.data.batch import IGNORE, Encoded
from perta.engine.gradients import engine, powers
from perta.engine.gradients._parts import MeansInParts
from perta.engine.moments import plan_moments, sum_moments
from perta.engine.shard import Whole, by_layer
from perta.engine.train.optimizer import Trainer
from perta.engine.train.tune import tune
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, ScoringOptions, run_items
from perta.methods.directions import projected_direction
from perta.models.loss import losses_of
from perta.models.precision import products_in
from perta.options import EstimatorConfig, MomentOptions, TuneConfig
from perta.parallel import everywhere, gathered, keep_part, lead
from perta.progress import set_quiet
from perta.stages.importance import estimate
from perta.temporary import temporarily

ROWS, LENGTH = 32, 48
STAGES = ("tuning, one epoch", "importance, one order", "moments", "evaluation")

# --- operations and bytes -----------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Counts the bytes of the tensors that this process hands to collective operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation and let it happen."""
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


FLOPS, SENT = FlopCounterMode(display=False), Sent()
MARKS: list[tuple[int, int]] = []


def mark() -> None:
    """Note how far this process's counters are."""
    MARKS.append((FLOPS.get_total_flops(), SENT.bytes))


def marks() -> list[list[tuple[int, int]]]:
    """The notes of all processes."""
    return gathered(MARKS)


def rows(number: int, length: int = LENGTH) -> list[Encoded]:
    """Random sequences of one length; the last quarter carries loss."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(number):
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        labels = [IGNORE] * (3 * length // 4) + ids[3 * length // 4 :]
        found.append(Encoded(tuple(ids), tuple(labels), row + 1))
    return found


def small() -> PreTrainedModel:
    """A Llama that computes in no time."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def run(number: int, target: Path) -> None:
    """Every stage in memory, with a note before each and at the end."""
    examples, options = rows(number), MomentOptions()
    batch = number // 2

    def moments() -> None:
        model = small()
        plan = plan_moments(model, examples, gradients=False, pad=0)
        for _ in sum_moments(model, examples, plan, options, pad=0, batch_size=4):
            pass

    settings = TuneConfig(epochs=1, learning_rate=1e-3, batch_size=batch, stop_loss=0)
    items = [Item((e,), e.input_ids[: LENGTH // 2]) for e in examples]
    scoring = ScoringOptions(Masking(0), batch_size=4, max_new_tokens=8)
    stages: list[Callable[[], object]] = [
        lambda: tune(small(), examples, settings, pad=0),
        lambda: estimate(small(), examples, (2.0,), EstimatorConfig(), pad=0, batch_size=4),
        moments,
        lambda: run_items(small(), items, scoring),
    ]
    for stage in stages:
        everywhere(mark)
        stage()
    everywhere(mark)
    target.write_text(json.dumps(everywhere(marks)))


def child(number: int, target: Path) -> None:
    """One process of a run."""
    powers.__dict__["_compiled"] = None  # the counter sees PyTorch's operations alone
    with FLOPS, SENT:
        lead(lambda: run(number, target))


def counted(size: int, number: int) -> list[tuple[int, int]]:
    """Operations and bytes of each stage, of the process that has most."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "marks.json"
        own = [__file__, "--rows", str(number), "--target", str(target)]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *torchrun, *own], check=True, env=environment, capture_output=True
        )
        found = json.loads(target.read_text())
    return [
        (
            max(own[i + 1][0] - own[i][0] for own in found),
            max(own[i + 1][1] - own[i][1] for own in found),
        )
        for i in range(len(STAGES))
    ]


def print_shares(sizes: list[int]) -> None:
    """A row for each stage and kind of scaling."""
    weights = 4 * sum(p.numel() for p in small().parameters())
    print("| stage | rows | " + " | ".join(f"N = {size}" for size in sizes) + " |")
    print("| --- | --- |" + " --- |" * len(sizes))
    for kind, of in (("the same", lambda _: ROWS), ("the same a process", lambda n: ROWS // 2 * n)):
        found = {size: counted(size, of(size)) for size in sizes}
        for i, stage in enumerate(STAGES):
            one = found[sizes[0]][i][0]
            cells = [f"{found[s][i][0] / one:.2f}; {found[s][i][1] / weights:.1f}" for s in sizes]
            print(f"| {stage} | {kind} | " + " | ".join(cells) + " |", flush=True)


# --- peaks --------------------------------------------------------------------------------------

MODELS = {
    "1B": (2048, 8192, 16, 32, True),
    "8B": (4096, 14336, 32, 32, False),
    "70B": (8192, 28672, 80, 64, False),
}
"""Name -> width, MLP width, layers, heads, tied, as in Llama 3."""
RANK = 16
TUNINGS = {
    "all weights": TuneConfig(learning_rate=1e-4),
    "all weights, `--gradient-checkpointing`": TuneConfig(
        learning_rate=1e-4, gradient_checkpointing=True
    ),
    f"`--lora-rank {RANK}`": TuneConfig(learning_rate=1e-4, lora_rank=RANK),
    f"`--lora-rank {RANK} --gradient-checkpointing`": TuneConfig(
        learning_rate=1e-4, lora_rank=RANK, gradient_checkpointing=True
    ),
}


PROCESSES = (2, 8, 16)
"""Numbers of processes among which the model is divided."""

MEASUREMENTS: dict[str, dict[str, Any]] = {
    "importance, one order": {},
    "… `--gradient-checkpointing`": {"gradient_checkpointing": True},
    "… `--gradient-checkpointing --accumulate-on cpu`": {
        "gradient_checkpointing": True,
        "accumulate_on": "cpu",
    },
    "importance, two orders": {"orders": (1.0, 2.0)},
}


COUNTING = (torch.int64, torch.int32, torch.bool)


def own_part(tensor: Tensor) -> Tensor:
    """What a process has of a tensor that is divided; else the tensor."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


class Peak(TorchDispatchMode):
    """Bytes of all storages that live, and the most there ever were.

    What is made of a batch alone, such as the places of its labels, is computed: sizes depend on
    it. Numbers that are read are taken to be in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes."""
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_fake = any(isinstance(own_part(tensor), FakeTensor) for tensor in given)
        counts = func is torch.ops.aten.arange.default or kwargs.get("dtype") in COUNTING
        if not is_fake and (given or counts):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(args[0].dtype == torch.bool)
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(own_part(tensor).untyped_storage())
        return made

    def elsewhere(self) -> AbstractContextManager[None]:
        """What is made meanwhile lies in the computer's memory and not in the GPU's."""
        return temporarily(partial(setattr, self, "_counts"), False, True)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if self._counts else 0
            self.now += self._sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key)

    def resize(self, tensor: Tensor, size: int) -> None:
        """Take note that a storage has another size now, of which no operation tells."""
        key = tensor.untyped_storage()._cdata
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.most = max(self.most, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def counted_memory() -> Iterator[Peak]:
    """Memory that is counted and never taken."""
    # All is in one place already, and fake tensors cannot be moved in place.
    stays = patch.object(nn.Module, "to", lambda self, *_, **__: self)
    with stays, FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        yield peak


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Operations that accelerators get, though the tensors say that they are on a CPU."""

    def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(left), left.shape[1], right.shape[2], dtype=dtype)

    put = {"wide_product": product, "_compiled": None, "_CACHE_BYTES": powers._DEVICE_BYTES}
    with patch.dict(powers.__dict__, put):
        yield


def llama(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Llama 3 without memory."""
    width, inner, layers, heads, tied = MODELS[name]
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )  # fmt: skip
    before = torch.get_default_dtype()
    with temporarily(torch.set_default_dtype, dtype, before):
        model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def measuring_peak(name: str, settings: dict[str, Any], processes: int = 1) -> int:
    """Bytes of importance of a batch of 8 rows in bfloat16."""
    with counted_memory() as peak, as_on_gpus(), held_in_parts(name, processes, peak) as model:

        def zeros(count: int, dtype: torch.dtype, _: torch.device) -> Tensor:
            with peak.elsewhere() if "accumulate_on" in settings else nullcontext():
                return torch.zeros(count, dtype=dtype)

        def total(own: MeansInParts, _: float) -> Tensor:
            with peak.elsewhere():
                return torch.empty(own.parameter.shape)

        given = {"orders": (2.0,), **settings}
        with patch.dict(engine.__dict__, _zeros=zeros), patch.object(MeansInParts, "total", total):
            estimate(model, rows(8, 256), config=EstimatorConfig(), pad=0, batch_size=8, **given)
        return peak.most


def passing_peak(name: str, processes: int) -> int:
    """Bytes of a pass of 8 rows in bfloat16 in which nothing is measured."""
    with counted_memory() as peak, held_in_parts(name, processes, peak) as model:
        losses_of(model, rows(8, 256), batch_size=8, pad=0)
        return peak.most


@contextmanager
def held_in_parts(name: str, processes: int, peak: Peak) -> Iterator[PreTrainedModel]:
    """A model in bfloat16 as one of so many processes has it between two passes."""
    with one_of(processes, peak) as whole:
        model = llama(name, torch.bfloat16)
        if whole is not None:
            whole.divide(model)
            keep_part(model)
        peak.most = peak.now
        yield model
        keep_part(None)


@contextmanager
def one_of(processes: int, peak: Peak) -> Iterator[Whole | None]:
    """As one of several processes whose messages nobody sends: how it has its model, if divided."""
    if processes == 1:
        yield None
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    put = {
        "alloc_storage": lambda tensor: peak.resize(tensor, tensor.numel() * tensor.itemsize),
        "free_storage": lambda tensor: peak.resize(tensor, 0),
    }
    divide = patch.object(Whole, "divide", lambda own, m: by_layer(m, own.device, processes))
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with (
            divide,
            patch.dict(_fsdp_param.__dict__, put),
            patch.dict(_fsdp_param_group.__dict__, {"alloc_storage": put["alloc_storage"]}),
        ):
            yield Whole(None, torch.device("cpu"), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def tuning_peak(
    name: str,
    settings: TuneConfig,
    processes: int = 1,
    batch: int = 4,
    length: int = 256,
    held: torch.dtype = torch.float32,
) -> int:
    """Bytes of one tuning step with bfloat16 products; a quarter of the positions has a loss."""
    with counted_memory() as peak, one_of(processes, peak) as whole:
        model = llama(name, held)
        trainer = Trainer.of(model, settings, 2 * batch, torch.bfloat16, whole)
        trainer.model.train()
        peak.most = peak.now
        ids = torch.zeros(batch, length, dtype=torch.int64)
        targets = torch.zeros(batch * length // 4, dtype=torch.int64)
        for _ in range(2):
            with products_in(torch.bfloat16, ids.device):
                out = trainer.model(input_ids=ids, use_cache=False, logits_to_keep=length // 4)
                logits = out.logits.float().flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, targets)
            loss.backward()
            del out, logits, loss
            trainer.step()
        return peak.most


def solving_peak(name: str, rows: int | None) -> int:
    """Bytes of the solve of the widest layer, of so many rows of a task vector or of all."""
    width, inner = MODELS[name][:2]
    with counted_memory() as peak:
        tau, moment = torch.empty(rows or width, inner), torch.empty(inner, inner)
        projected_direction(tau.double(), moment, 3.0)
        return peak.most


def print_files(names: list[str]) -> None:
    """Gigabytes of the files between tuning and edit."""
    for what, rank in (("all weights", 0), (f"`--lora-rank {RANK}`", RANK)):
        forget, step = [], []
        for name in names:
            with counted_memory():
                shapes = {n: tuple(p.shape) for n, p in llama(name).named_parameters()}
            every = [math.prod(shape) for shape in shapes.values()]
            layers = {n: RANK * sum(shape) for n, shape in shapes.items() if "_proj" in n}
            mlps = [n for n in layers if ".mlp." in n]
            forget.append(sum(layers.values()) if rank else sum(every))
            step.append(sum(layers[n] if rank else math.prod(shapes[n]) for n in mlps))
        for file, counts in (("forget checkpoint", forget), ("direction", step)):
            cells = [f"{4 * count / 1e9:.2f}" for count in counts]
            print(f"| {file}, {what} | " + " | ".join(cells) + " |")


def print_peaks(names: list[str]) -> None:
    """A row for each way to tune, to measure and to solve, and for each file between them."""
    print("| step | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    ways: list[tuple[str, Callable[[str, Any], int], Any]] = []
    for what, given in TUNINGS.items():
        ways += [(f"tuning, {what}", tuning_peak, given)]
    narrow, adapter = partial(tuning_peak, held=torch.bfloat16), [*TUNINGS.values()][-1]
    ways += [("… `--frozen-dtype bfloat16`", narrow, adapter)]
    for n in PROCESSES:
        for what, given in TUNINGS.items():
            if given.gradient_checkpointing:
                ways += [(f"tuning, {what}, one of {n}", partial(tuning_peak, processes=n), given)]
        ways += [
            (f"… `--frozen-dtype bfloat16`, one of {n}", partial(narrow, processes=n), adapter)
        ]
        sparing = {"gradient_checkpointing": True}
        for what, orders in (("one order", (2.0,)), ("two orders", (1.0, 2.0))):
            part = partial(measuring_peak, processes=n)
            ways += [(f"importance, {what}, one of {n}", part, {**sparing, "orders": orders})]
        ways += [(f"a pass, one of {n}", passing_peak, n)]
    ways += [(what, measuring_peak, given) for what, given in MEASUREMENTS.items()]
    ways += [("solve, all weights", solving_peak, None)]
    ways += [(f"solve, `--lora-rank {RANK}`", solving_peak, RANK)]
    for what, peak_of, given in ways:
        cells = [f"{peak_of(name, given) / 1e9:.1f}" for name in names]
        print(f"| {what} | " + " | ".join(cells) + " |", flush=True)
    print_files(names)


def main() -> None:
    """Print both tables, or be one process of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--peaks", nargs="*", choices=MODELS, default=["1B", "8B", "70B"])
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        child(options.rows, options.target)
        return
    set_quiet(True)
    # Which layers a rule fits is told by numbers, and here are none.
    logging.disable(logging.WARNING)
    if options.peaks:
        print_peaks(options.peaks)
    if options.sizes:
        print_shares(options.sizes)


if __name__ == "__main__":
    main()
