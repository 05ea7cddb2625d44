"""Every check and figure that needs a GPU, one JSON line a figure.

    python benchmarks/gpu.py [SECTION ...] [--minutes 10] [--model FOLDER --data FOLDER]
    python benchmarks/gpu.py --cpu          # all of it at toy size, to find mistakes here first

    correct      every engine on the GPU against the CPU in float32, and bfloat16 against both
    importance   the engine, with its kernel and without, against a plain pass
    moments      products by type, and the sums of a whole model
    solve        a layer's direction in float64
    finetune     tokens per second and peak memory, all weights and LoRA
    evaluation   new tokens per second by batch
    small        tuning, scoring and moments of a model of 135M, where launching is what takes time
    request      whole requests: three seeds, each of forget01, forget05 and forget10

Each section has `--minutes`, and a failed one does not stop the others. `--model` and `--data` are
for `request`: a model and a folder of TOFU's JSONL files; without them there is nothing to ask for.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from models import write_people_sets, write_random_model
from perta.data.batch import IGNORE, Encoded, bucketed
from perta.data.rows import write_jsonl
from perta.engine.gradients import powers
from perta.engine.gradients.engine import Moments, batched_moments, example_loop_moments
from perta.engine.moments import plan_moments, sum_moments
from perta.engine.train.tune import tune
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, ScoringOptions, run_items
from perta.methods.directions import projected_direction
from perta.models.demo.tiny import tiny_llama
from perta.models.load import pick_device
from perta.models.loss import example_losses, losses_of
from perta.models.precision import products_in, wide_product
from perta.options import ComputeConfig, DType, MomentOptions, TuneConfig
from perta.progress import set_quiet
from perta.recipes.unlearn import unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig

PEAK = 989e12
"""bfloat16 operations per second of an H100, for the share of it that is used."""
PAD = 2
QUICKLY: dict[str, Any] = {"method": "tv", "alpha": 1.0, "generate": False, "epochs": 1}
"""A request at toy size."""
SIZES = {
    "toy": (64, 128, 2, 4, 2, 211),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
"""Width, MLP width, layers, heads, heads of keys and values, vocabulary."""


@dataclass(frozen=True)
class Run:
    """Where to run, at what size, and what was given."""

    device: torch.device
    toy: bool
    model: Path | None = None
    data: Path | None = None

    def pick(self, real: Any, toy: Any) -> Any:
        """One of two, by size."""
        return toy if self.toy else real

    def wait(self) -> None:
        """Until the device has done all."""
        if not self.toy:
            torch.cuda.synchronize()

    def peak(self) -> float | None:
        """Most memory held since `clean`, in GB; None on a CPU."""
        return None if self.toy else torch.cuda.max_memory_allocated() / 1e9

    def clean(self) -> None:
        """Give memory back and count its peak anew."""
        if not self.toy:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, work: Callable[[], object], times: int = 3) -> float:
        """Mean time of some work, after one try."""
        work()
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - started) / times

    def llama(self, size: str, dtype: torch.dtype) -> Any:
        """A random Llama; that of 8B has a head of its own."""
        width, inner, layers, heads, shared, vocabulary = SIZES["toy" if self.toy else size]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            max_position_embeddings=8192,
            tie_word_embeddings=size != "8B",
            pad_token_id=PAD,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def tell(section: str, **figures: Any) -> None:
    """One line of figures."""
    print(json.dumps({"section": section, **figures}), flush=True)


def rows_of(count: int, mean: int, vocabulary: int) -> list[Encoded]:
    """Random sequences of half to one and a half times a length; half of each is the answer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(1, count + 1):
        length = max(8, int(mean * (0.5 + torch.rand((), generator=generator).item())))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = length // 2
        found.append(Encoded(tuple(ids), (*[IGNORE] * prompt, *ids[prompt:]), row))
    return found


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest difference of a tensor over its largest value."""
    return max(
        float((found[n].cpu() - exact[n].cpu()).abs().max() / exact[n].abs().max().clamp_min(1e-30))
        for n in exact
    )


def correct(run: Run) -> None:
    """Every engine against the CPU in float32."""
    rows, device = rows_of(11, 12, 97), run.device
    batches = bucketed(rows, 4, PAD)

    def model(dtype: torch.dtype = torch.float32) -> Any:
        return nn.Module.to(tiny_llama(97), device, dtype)

    def importance(model: Any, **more: Any) -> Moments:
        return batched_moments(model, batches, (1.0, 2.0), **more)

    exact = batched_moments(tiny_llama(97), batches, (1.0, 2.0)).by_order
    for what, found in {
        "float32": importance(model()),
        "bfloat16": importance(model(torch.bfloat16)),
        "means on the CPU": importance(model(), accumulate_on="cpu"),
        "checkpointing": importance(model(), gradient_checkpointing=True),
        "again": importance(model()),
        "example loop": example_loop_moments(model(), batches, (1.0, 2.0)),
    }.items():
        errors = {f"order_{p:g}": worst(found.by_order[p], exact[p]) for p in (1.0, 2.0)}
        tell("correct", what=f"importance, {what}", **errors)
    # Attention over some hundreds of tokens is where two runs may differ.
    long = bucketed(rows_of(8, run.pick(400, 40), 97), 4, PAD)
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (batched_moments(model(dtype), long, (2.0,)).by_order[2.0] for _ in range(2))
        same = all(torch.equal(one[name], other[name]) for name in one)
        tell("correct", what=f"importance of long rows, {dtype}, twice", same_bits=same)

    for dtype in (torch.float32, torch.bfloat16):
        error = _kernel_error(run, dtype)
        tell("correct", what=f"products in registers, {dtype}", error=error)

    def moments(model: Any) -> dict[str, Tensor]:
        plan = plan_moments(model, rows, gradients=True, pad=PAD)
        return dict(sum_moments(model, rows, plan, MomentOptions(), pad=PAD))

    sums = moments(tiny_llama(97))
    for dtype in (torch.float32, torch.bfloat16):
        tell("correct", what=f"moments, {dtype}", error=worst(moments(model(dtype)), sums))
    config = TuneConfig(epochs=3, batch_size=4, learning_rate=1e-3, stop_loss=0)

    def step(model: Any, dtype: DType) -> tuple[Tensor, tuple[float, ...]]:
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        done, tuned = tune(model, rows, config, pad=PAD, dtype=dtype)
        end = torch.cat([p.detach().flatten() for p in done.parameters()])
        return (end - start).cpu(), tuned.final_losses

    tau, _ = step(tiny_llama(97), "float32")
    types: tuple[DType, ...] = ("float32", "bfloat16")
    for products in types:
        (first, losses), (second, again) = (step(model(), products) for _ in range(2))
        cosine = float(torch.cosine_similarity(first, tau, dim=0))
        equal = {"same_bits": torch.equal(first, second), "same_losses": losses == again}
        tell("correct", what=f"fine-tune, {products}", cosine=cosine, **equal)
    items = [Item((row,), row.input_ids[:4]) for row in rows]
    options = ScoringOptions(Masking(PAD), max_new_tokens=8)
    texts = [[o.generated for o in run_items(m, items, options)] for m in (tiny_llama(97), model())]
    tell("correct", what="greedy answers", same=texts[0] == texts[1])


def _kernel_error(run: Run, dtype: torch.dtype) -> float:
    """Largest error of means of powers, by the kernel or compiled pass there is, to float64's."""
    generator = torch.Generator().manual_seed(1)
    segments = ((0, 70), (70, 71), (75, 300), (300, 300))
    left, right = (
        torch.randn(310, n, generator=generator).to(run.device, dtype) for n in (331, 203)
    )
    means = {p: torch.zeros(331, 203, device=run.device) for p in (1.0, 2.0)}
    powers.add_pieces(powers.Means(means, 0.25), [powers.Product(left, right, segments)])
    exact = {p: torch.zeros(331, 203, dtype=torch.float64) for p in means}
    for start, stop in segments:
        gradient = left[start:stop].double().cpu().t() @ right[start:stop].double().cpu()
        for order, total in exact.items():
            total += gradient.abs() ** order / 4
    found = {str(p): mean.double().cpu() for p, mean in means.items()}
    return worst(found, {str(p): total for p, total in exact.items()})


def importance(run: Run) -> None:
    """The engine, with its kernel and without, against a plain pass."""
    for size, mean, count, sizes in (("1B", 80, 32, (8, 32)), ("8B", 80, 16, (8,))):
        model = run.llama(size, torch.bfloat16)
        rows = rows_of(run.pick(count, 4), run.pick(mean, 12), model.config.vocab_size)
        tokens = sum(len(row.input_ids) for row in rows)
        for batch in sizes:
            batches = bucketed(rows, batch, PAD)

            def plain(model: Any = model, batches: Any = batches) -> None:
                for one in batches:
                    example_losses(model, one.to(run.device)).sum().backward()
                    model.zero_grad(set_to_none=True)

            run.clean()
            base = run.seconds(plain, 2)
            about = {"size": size, "batch": batch}
            tell("importance", **about, what="plain", tokens_per_s=tokens / base, peak=run.peak())
            # Two orders of 8B in float32 take 64 GB.
            for orders in ((2.0,), (1.0, 2.0))[: 1 if size == "8B" else 2]:
                for what in ("kernel", "operations"):
                    run.clean()
                    without = patch.object(powers, "_has_kernel", lambda *_: False)
                    with contextlib.nullcontext() if what == "kernel" else without:
                        spent = run.seconds(partial(batched_moments, model, batches, orders), 2)
                    figures = {"ratio": spent / base, "peak": run.peak()}
                    tell("importance", **about, orders=orders, what=what, **figures)


def moments(run: Run) -> None:
    """Products of activations by type, and the sums of a whole model."""
    for width, tokens in run.pick(((4096, 1024), (14336, 8192)), ((64, 128),)):
        values = torch.randn(1, tokens, width, device=run.device, dtype=torch.bfloat16)
        exact = values.float().mT @ values.float()
        ways: dict[str, Callable[[], Tensor]] = {
            "float32": lambda r=values: r.float().mT @ r.float(),  # type: ignore[misc]
            "bfloat16, float32 sums": lambda r=values: wide_product(r.mT, r, torch.float32),  # type: ignore[misc]
            "bfloat16": lambda r=values: r.mT @ r,  # type: ignore[misc]
        }
        for what, product in ways.items():
            error = float((product().float() - exact).norm() / exact.norm())
            seconds = run.seconds(product)
            tell("moments", width=width, tokens=tokens, what=what, seconds=seconds, error=error)
    model = run.llama("8B", torch.bfloat16)
    rows = rows_of(run.pick(32, 4), run.pick(200, 12), model.config.vocab_size)
    plan = plan_moments(model, rows, gradients=False, pad=PAD)
    for memory in (8.0, 50.0):
        run.clean()
        options = MomentOptions(moment_memory=memory)
        started = time.perf_counter()
        for _ in sum_moments(model, rows, plan, options, pad=PAD):
            pass
        tell("moments", gib=memory, seconds=time.perf_counter() - started, peak=run.peak())


def solve(run: Run) -> None:
    """A layer's direction, in float64 as the stage solves it."""
    for width, height in run.pick(((4096, 6144), (14336, 4096)), ((64, 96),)):
        rows = torch.randn(2 * width, width, device=run.device)
        moment, tau = rows.t() @ rows, torch.randn(height, width, device=run.device)
        del rows
        run.clean()
        seconds = run.seconds(lambda t=tau, m=moment: projected_direction(t, m, 3.0), 1)  # type: ignore[misc]
        tell("solve", width=width, outputs=height, seconds=seconds, peak=run.peak())


def finetune(run: Run) -> None:
    """Tokens per second of tuning."""
    lora: dict[str, Any] = {"lora_rank": 16, "gradient_checkpointing": True}
    wide, narrow = torch.float32, torch.bfloat16
    for size, batch, held, more in (
        *(("1B", batch, wide, dict[str, Any]()) for batch in (4, 16, 32)),
        *(("8B", 8, held, lora) for held in (wide, narrow)),
    ):
        model = run.llama(size, held)
        rows = rows_of(run.pick(2 * batch, 4), run.pick(80, 12), model.config.vocab_size)
        config = TuneConfig(epochs=2, batch_size=batch, stop_loss=0, **more)
        run.clean()
        started = time.perf_counter()
        _, tuned = tune(model, rows, config, pad=PAD)
        run.wait()
        speed = tuned.tokens / (time.perf_counter() - started)
        used = 6 * sum(p.numel() for p in model.parameters()) * speed / PEAK
        about = {"size": size, "batch": batch, "lora": bool(more), "held": str(held)}
        tell("finetune", **about, tokens_per_s=speed, share_of_peak=used, peak=run.peak())
        del model


def evaluation(run: Run) -> None:
    """New tokens per second."""
    model = run.llama("1B", torch.bfloat16)
    rows = rows_of(run.pick(256, 4), run.pick(80, 12), model.config.vocab_size)
    items = [Item((row,), row.input_ids[: len(row.input_ids) // 2]) for row in rows]
    for batch in (16, 64, 256):
        run.clean()
        options = ScoringOptions(Masking(PAD), batch_size=batch, max_new_tokens=run.pick(64, 4))
        started = time.perf_counter()
        outcomes = run_items(model, items, options)
        run.wait()
        speed = sum(len(o.generated or ()) for o in outcomes) / (time.perf_counter() - started)
        tell("evaluation", batch=batch, new_tokens_per_s=speed, peak=run.peak())


def small(run: Run) -> None:
    """Rows per second of a model of the shape of SmolLM2-135M."""
    rows = rows_of(run.pick(512, 8), run.pick(80, 12), SIZES["toy" if run.toy else "135M"][-1])
    for batch in run.pick((4, 16, 32), (4,)):
        model = run.llama("135M", torch.float32)
        config = TuneConfig(epochs=1, batch_size=batch, stop_loss=0)
        tune(model, rows[:batch], config, pad=PAD)
        started = time.perf_counter()
        tune(model, rows, config, pad=PAD)
        run.wait()
        seconds = time.perf_counter() - started
        tell("small", what="tune", batch=batch, rows_per_s=len(rows) / seconds, peak=run.peak())
    with products_in(torch.bfloat16, run.device):
        for batch in run.pick((16, 128), (4,)):
            score = partial(losses_of, model, rows, batch_size=batch, pad=PAD)
            speed = len(rows) / run.seconds(score, 1)
            tell("small", what="score", batch=batch, rows_per_s=speed)
        plan = plan_moments(model, rows, gradients=False, pad=PAD)
        for batch in run.pick((8, 64), (4,)):

            def sums(batch: int = batch) -> None:
                for _ in sum_moments(model, rows, plan, MomentOptions(), pad=PAD, batch_size=batch):
                    pass

            speed = len(rows) / run.seconds(sums, 1)
            tell("small", what="moments", batch=batch, rows_per_s=speed)


def request(run: Run) -> None:
    """Whole requests: the full model is tuned first, then each set is forgotten with each seed."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if run.toy:
            write_people_sets(place, 4, 2, 1)
            write_random_model(place / "model", "tiny")
            given = {"people": (place / "forget.jsonl", place / "retain.jsonl")}
            base = place / "model"
        elif run.model is None or run.data is None:
            tell("request", left_out="it needs --model and --data")
            return
        else:
            base, data = run.model, run.data
            given = {
                f"forget{n:02}": (data / f"forget{n:02}.jsonl", data / f"retain{100 - n}.jsonl")
                for n in (1, 5, 10)
            }
        for name, (forget, retain) in given.items():
            rows = [
                json.loads(line)
                for f in (forget, retain)
                for line in f.read_text("utf-8").splitlines()
            ]
            write_jsonl(rows, place / f"{name}.jsonl")
            for seed in run.pick((0, 1, 2), (0,)):
                folder = place / f"{name}-{seed}"
                config = FinetuneConfig(
                    base=str(base), data=str(place / f"{name}.jsonl"), output=folder / "full"
                )
                settings = replace(config.tune, seed=seed)
                settings = replace(settings, epochs=1) if run.toy else settings
                full = finetune_checkpoint(replace(config, tune=settings))
                started = time.perf_counter()
                made = unlearn(
                    base=base,
                    full=full,
                    forget=forget,
                    retain=retain,
                    output=folder / "out",
                    seed=seed,
                    **run.pick({}, QUICKLY),
                )
                figures = {row["metric"]: row["value"] for row in made.rows}
                seconds = time.perf_counter() - started
                tell("request", set=name, seed=seed, seconds=seconds, peak=run.peak(), **figures)


SECTIONS: dict[str, Callable[[Run], None]] = {
    f.__name__: f
    for f in (correct, importance, moments, solve, finetune, evaluation, small, request)
}


@contextlib.contextmanager
def limit(minutes: float) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"over {minutes:g} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str]) -> int:
    """Run the sections; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)} [default: all]")
    parser.add_argument("--cpu", action="store_true", help="toy size, on the CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each section")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if not given.cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --cpu runs everything at toy size")
    set_quiet(True)
    device = pick_device(ComputeConfig(device="cpu" if given.cpu else "cuda"))
    run = Run(device, given.cpu, given.model, given.data)
    card = "none" if run.toy else torch.cuda.get_device_name()
    tell("machine", gpu=card, torch=torch.__version__)
    failed = 0
    for name in given.sections or SECTIONS:
        started = time.perf_counter()
        try:
            with limit(given.minutes):
                SECTIONS[name](run)
        except Exception as error:  # the others may have figures all the same
            traceback.print_exc()
            failed += 1
            tell(name, failed=f"{type(error).__name__}: {error}")
        run.clean()
        tell(name, section_seconds=time.perf_counter() - started)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
