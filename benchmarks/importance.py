"""What per-example importance costs, side by side with the other ways to get it.

    python benchmarks/importance.py                        # SmolLM2-135M's shape, random weights
    python benchmarks/importance.py --model FOLDER         # a checkpoint
    python benchmarks/importance.py --only plain engine    # the two that matter, quickly

One process, one set of batches. After every batch of a contender the plain pass does the same
batch on a copy of the model, so that a busy moment of the machine hits both; ratios are to those
plain passes.

    plain         forward and backward of the mean loss, with the gradients of all weights
    engine 2      batched_moments, order 2
    engine 1+2    batched_moments, orders 1 and 2 together
    loop          example_loop_moments, order 2
    torch.func    vmap(grad(loss)), then squares and a mean; holds all gradients of a batch
    opacus        its GradSampleModule, likewise; left out unless opacus can be imported:
                  pip install --no-deps --target FOLDER opacus opt_einsum, PYTHONPATH=FOLDER

What the engine does once per data set (allocating and clearing the means, checking the norms) is
told apart; the ratio of the whole run spreads it over `--batches`. `--accuracy` compares every
contender with a float64 example loop.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from perta.data.batch import IGNORE, Batch, Encoded, collate
from perta.engine.gradients.engine import batched_moments, example_loop_moments
from perta.models.loss import example_losses
from records import Record, add_option, save

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)

Between = Callable[[], None]
Run = Callable[[Sequence[Batch], Between], object]
"""Runs batches, and calls back after each."""


@dataclass
class Race:
    """One run of a contender, and the plain passes in between.

    Attributes:
        seconds: of every batch; the first has most of what is done once for all.
        rest: after the last batch.
        plain: seconds of the plain pass over every batch.
    """

    seconds: list[float] = field(default_factory=list)
    rest: float = 0.0
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over batches, without the first."""
        later = slice(min(1, len(self.seconds) - 1), None)
        pairs = zip(self.seconds[later], self.plain[later], strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def whole_ratio(self) -> float:
        """Of the whole run."""
        return (sum(self.seconds) + self.rest) / sum(self.plain)

    @property
    def once(self) -> float:
        """Seconds beyond those of batches like the later ones."""
        typical = statistics.median(self.seconds[min(1, len(self.seconds) - 1) :])
        return sum(self.seconds) + self.rest - typical * len(self.seconds)


@dataclass
class Measured:
    """One contender's figures: peak memory of one batch above the start in MB, and its races."""

    memory: float
    races: list[Race] = field(default_factory=list)


def main() -> None:
    """Run the contenders and print the table."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load(options.model, options.dtype).to(options.device).eval()
    batches = make_batches(options, model.config.vocab_size)
    conditions = describe(options, model)
    print(conditions)
    contenders = {
        name: run for name, run in make_contenders(model).items() if chosen(name, options.only)
    }
    measured = measure(contenders, copy.deepcopy(model), batches, options)
    report(measured, options)
    save(
        Record(
            "Per-example importance against one training pass",
            "time over that of a plain forward and backward pass",
            conditions,
            {
                name: [race.ratio for race in found.races]
                for name, found in measured.items()
                if name != "plain"
            },
            reference=1.0,
        ),
        options.json,
    )
    if options.accuracy:
        report_accuracy(model, batches[0], contenders)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; random weights without it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens per example; half labelled")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="contenders whose name starts with one of these")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time of the process, for a machine that others use too",
    )
    parser.add_argument(
        "--accuracy", action="store_true", help="also compare with the float64 example loop"
    )
    add_option(parser)
    return parser.parse_args()


def chosen(name: str, only: Sequence[str] | None) -> bool:
    """Whether a contender takes part; the plain pass always does."""
    return only is None or name == "plain" or any(name.startswith(start) for start in only)


def load(folder: Path | None, dtype: str) -> Any:
    """A checkpoint, or random weights of SmolLM2-135M's shape."""
    if folder is None:
        return LlamaForCausalLM(SMOLLM2_135M).to(getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def make_batches(options: argparse.Namespace, vocabulary: int) -> list[Batch]:
    """Batches of random tokens, the second half of each example labelled."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(options.batches):
        examples = []
        for row in range(options.batch_size):
            ids = torch.randint(vocabulary, (options.length,), generator=generator).tolist()
            prompt = options.length // 2
            labels = [IGNORE] * prompt + ids[prompt:]
            examples.append(Encoded(tuple(ids), tuple(labels), row + 1))
        batches.append(collate(examples, pad_id=2).to(options.device))
    return batches


# --- contenders -------------------------------------------------------------------------------


def make_contenders(model: Any) -> dict[str, Run]:
    """Every way to run the batches, the plain pass first."""
    contenders: dict[str, Run] = {
        "plain": one_by_one(lambda batches: plain(model, batches)),
        "engine 2": engine(model, [2]),
        "engine 1+2": engine(model, [1, 2]),
        "loop": one_by_one(lambda batches: example_loop_moments(model, batches, [2])),
        "torch.func": one_by_one(lambda batches: torch_func(model, batches)),
    }
    try:
        import opacus  # noqa: F401 - only to see whether it is there
    except ImportError:
        print("opacus is not installed: left out")
    else:
        contenders["opacus"] = one_by_one(lambda batches: opacus_gradients(model, batches))
    return contenders


def engine(model: Any, orders: Sequence[float]) -> Run:
    """Ours: all batches in one run."""
    return lambda batches, between: batched_moments(
        model, batches, orders, progress=lambda _: between()
    )


def one_by_one(run: Callable[[Sequence[Batch]], object]) -> Run:
    """A contender that does nothing once for all batches."""

    def all_of_them(batches: Sequence[Batch], between: Between) -> None:
        for batch in batches:
            run([batch])
            between()

    return all_of_them


def plain(model: Any, batches: Sequence[Batch]) -> None:
    """What a training step computes."""
    for batch in batches:
        model.zero_grad(set_to_none=True)
        example_losses(model, batch).mean().backward()
    model.zero_grad(set_to_none=True)


def torch_func(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean squares through vmap(grad)."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    before = model.config._attn_implementation
    # vmap cannot see through the fused attention once there is a mask.
    model.set_attn_implementation("eager")

    def loss(weights: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        inputs = {
            "input_ids": ids.unsqueeze(0),
            "attention_mask": mask.unsqueeze(0),
            "use_cache": False,
        }
        logits = torch.func.functional_call(model, weights, (), inputs).logits[0]
        return F.cross_entropy(logits[:-1].float(), labels[1:])

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    try:
        for batch in batches:
            found = per_example(weights, batch.input_ids, batch.attention_mask, batch.labels)
            for name, gradients in found.items():
                sums[name] += gradients.float().square().sum(0)
    finally:
        model.set_attn_implementation(before)
    return sums


def opacus_gradients(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean squares through opacus's hooks."""
    from opacus import GradSampleModule

    # The library rejects some layers when strict, though it can differentiate them. It listens
    # in training mode only, so a model with dropout would give random gradients.
    model.train()
    wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    try:
        for batch in batches:
            logits = wrapped(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            losses = F.cross_entropy(
                logits[:, :-1].transpose(1, 2).float(), batch.labels[:, 1:], reduction="none"
            )
            (losses.sum(1) / (batch.labels[:, 1:] != IGNORE).sum(1)).sum().backward()
            for name, parameter in model.named_parameters():
                sums[name] += parameter.grad_sample.float().square().sum(0)
            wrapped.zero_grad(set_to_none=True)
    finally:
        wrapped.to_standard_module()
        model.eval()
        model.zero_grad(set_to_none=True)
    return sums


# --- measuring --------------------------------------------------------------------------------


def measure(
    contenders: dict[str, Run],
    twin: Any,
    batches: Sequence[Batch],
    options: argparse.Namespace,
) -> dict[str, Measured]:
    """Run every contender several times over, with plain passes over `twin` in between."""
    measured: dict[str, Measured] = {}
    for name, run in contenders.items():
        try:
            start = reset_peak(options.device)
            run(batches[:1], lambda: None)
            measured[name] = Measured(read_peak(options.device) - start)
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {str(error)[:200]}")
        gc.collect()
    for _ in range(options.repeats):
        for name, found in measured.items():
            found.races.append(race(contenders[name], twin, batches, options))
            gc.collect()
    return measured


def race(run: Run, twin: Any, batches: Sequence[Batch], options: argparse.Namespace) -> Race:
    """Run a contender, and plain passes over the same batches in between."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    found, start = Race(), 0.0

    def now() -> float:
        synchronize(options.device)
        return clock()

    def between() -> None:
        nonlocal start
        end = now()
        plain(twin, [batches[len(found.plain)]])
        found.seconds.append(end - start)
        start = now()
        found.plain.append(start - end)

    start = now()
    run(batches, between)
    found.rest = now() - start
    return found


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> float:
    """Start a new peak of memory; returns what is in use now, in MB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return read_status("VmRSS")


def read_peak(device: str) -> float:
    """Peak memory since `reset_peak`, in MB; NaN where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return read_status("VmHWM")


def read_status(field: str) -> float:
    """A size from /proc/self/status, in MB; NaN where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    for line in status.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


# --- reporting --------------------------------------------------------------------------------


def describe(options: argparse.Namespace, model: Any) -> str:
    """One line on what ran where."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    device = platform.processor() or platform.machine()
    if options.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    name = options.model.name if options.model else "random weights"
    return (
        f"{name}, {size:.0f}M parameters, {options.dtype}; "
        f"{options.batches} batches of {options.batch_size} x {options.length} tokens, half "
        f"labelled; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{options.clock} time"
    )


def report(measured: dict[str, Measured], options: argparse.Namespace) -> None:
    """Print seconds, and ratios to the plain pass with their spread."""
    heads = ("s/batch", "s once", "ratio of a batch", "of the whole run", "peak MB")
    print("\n{:12}{:>10}{:>10}{:>22}{:>22}{:>10}".format("", *heads))
    for name, found in measured.items():
        later = [seconds for race in found.races for seconds in race.seconds[1:] or race.seconds]
        print(
            f"{name:12}{statistics.median(later):10.3f}"
            f"{statistics.median(race.once for race in found.races):10.2f}"
            f"{spread([race.ratio for race in found.races]):>22}"
            f"{spread([race.whole_ratio for race in found.races]):>22}{found.memory:10.0f}"
        )
    print(
        f"{options.repeats} repeats: median [min, max]; a batch is one after the first; peak "
        "memory of one batch, above the models' own"
    )


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def report_accuracy(model: Any, batch: Batch, contenders: Container[str]) -> None:
    """Print the distance to the float64 loop, on two examples, of all that give mean squares."""
    fields = (batch.input_ids, batch.attention_mask, batch.labels, batch.index, batch.weights)
    few = [Batch(*(field[:2] for field in fields))]
    exact = example_loop_moments(model, few, [1, 2], dtype=torch.float64).by_order
    engine = batched_moments(model, few, [1, 2]).by_order
    for order, tensors in engine.items():
        tell_error(f"engine, order {order:g}", tensors, exact[order])
    tell_error("loop", example_loop_moments(model, few, [2]).by_order[2.0], exact[2.0])
    sums = {"torch.func": torch_func, "opacus": opacus_gradients}
    for name in (name for name in sums if name in contenders):
        means = {key: value / 2 for key, value in sums[name](model, few).items()}
        tell_error(name, means, exact[2.0])


def tell_error(name: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Print the tensor that is farthest off, relative to its largest element."""
    errors = {
        key: float((found[key] - value).abs().max() / value.abs().max())
        for key, value in exact.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    print(f"{name}: relative error up to {errors[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
