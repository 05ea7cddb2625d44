"""What bfloat16 products gain on a CPU with matrix units: every stage, side by side with float32.

    python benchmarks/amx.py [--model FOLDER] [--repeats 5] [--batch 4 16]

Without a model: SmolLM2-135M's shape with random weights. In every repeat each stage runs once in
float32 and once in bfloat16, in turn, so that a busy moment of the machine hits both; the ratio is
that of the pair. Times are of the processor, summed over threads, so that other work counts little.
Importance is shown for what it would gain; on CPUs `--dtype auto` leaves it in float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from importance import SMOLLM2_135M
from models import write_people_sets
from perta.data.batch import Encoded, bucketed
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.gradients.engine import batched_moments
from perta.engine.moments import plan_moments, sum_moments
from perta.engine.train.tune import tune
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, ScoringOptions, run_items
from perta.models.load import load_model, load_tokenizer, pad_id
from perta.options import ComputeConfig, DataConfig, DType, MomentOptions, TuneConfig
from perta.progress import set_quiet
from records import Record, add_option, save

TYPES: tuple[DType, ...] = ("float32", "bfloat16")
Stage = Callable[[DType], object]


def random_model(folder: Path) -> Path:
    """SmolLM2-135M's shape with random weights, and a tokenizer for the people."""
    from transformers import LlamaForCausalLM

    from perta.evidence.people import generate_people
    from perta.models.demo.tiny import tiny_tokenizer

    torch.manual_seed(0)
    LlamaForCausalLM(SMOLLM2_135M).save_pretrained(folder)
    rows = generate_people(200, 20, seed=0)
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tiny_tokenizer([*texts, DataConfig().system_prompt]).save_pretrained(str(folder))
    return folder


def stages(folder: Path, rows: tuple[Encoded, ...], batches: list[int]) -> dict[str, Stage]:
    """Name -> one run of a stage in a type; models are loaded before."""
    pad = pad_id(load_tokenizer(folder))
    computes = {t: ComputeConfig(device="cpu", dtype=t) for t in TYPES}
    models = {t: load_model(folder, computes[t]) for t in TYPES}
    tuned = load_model(folder, computes["float32"])
    items = [Item((row,)) for row in rows]
    texts = [Item((row,), row.input_ids[: len(row.input_ids) // 2]) for row in rows[:16]]

    def fine_tune(size: int) -> Stage:
        # The losses at the end are taken in float32: a twelfth of all here, a sixtieth by default.
        config = TuneConfig(epochs=4, batch_size=size, stop_loss=0, learning_rate=1e-9)
        return lambda t: tune(tuned, rows[:size], config, pad=pad, dtype=t)

    def moments(t: DType) -> object:
        plan = plan_moments(models[t], rows, gradients=False, pad=pad)
        return [*sum_moments(models[t], rows, plan, MomentOptions(), pad=pad)]

    def importance(t: DType) -> object:
        return batched_moments(models[t], bucketed(rows[:16], 8, pad), (1.0,))

    def scored(chosen: list[Item], **more: Any) -> Stage:
        options = ScoringOptions(Masking(pad), frozenset(), 16, **more)
        return lambda t: run_items(models[t], chosen, options)

    return {
        **{f"fine-tune, batch {size}": fine_tune(size) for size in batches},
        "moments": moments,
        "teacher-forced scoring": scored(items),
        "generation": scored(texts, max_new_tokens=32),
        "importance": importance,
    }


def main() -> None:
    """Time every stage and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder [default: random weights]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--threads", type=int, default=1)
    add_option(parser)
    given = parser.parse_args()
    set_quiet(True)
    torch.set_num_threads(given.threads)
    print(f"matrix units: {torch.cpu._is_amx_tile_supported()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_people_sets(place, max(4, given.rows // 4), 4, 1)
        folder = given.model or random_model(place / "model")
        examples = load_examples(place / "full.jsonl")
        rows = encode_examples(examples, load_tokenizer(folder), DataConfig()).encoded[: given.rows]
        ratios: dict[str, list[float]] = {}
        print(f"{'stage':24} {'float32 s':>10} {'bfloat16 s':>10}  float32 / bfloat16")
        for name, stage in stages(folder, rows, given.batch).items():
            seconds: dict[DType, list[float]] = {t: [] for t in TYPES}
            for repeat in range(given.repeats + 1):
                for t in TYPES:
                    started = time.process_time()
                    stage(t)
                    if repeat:  # the first warms up
                        seconds[t].append(time.process_time() - started)
            pairs = zip(seconds["float32"], seconds["bfloat16"], strict=True)
            ratios[name] = sorted(wide / narrow for wide, narrow in pairs)
            middle = [statistics.median(seconds[t]) for t in TYPES]
            found = ratios[name]
            print(
                f"{name:24} {middle[0]:10.2f} {middle[1]:10.2f}  {statistics.median(found):.2f} "
                f"({found[0]:.2f} to {found[-1]:.2f})",
                flush=True,
            )
    what = given.model.name if given.model else "SmolLM2-135M's shape, random weights"
    threads = f"{given.threads} thread{'s' if given.threads > 1 else ''}"
    conditions = f"{what}; {len(rows)} rows; {threads}; {given.repeats} repeats"
    axis = "time in float32 over time in bfloat16"
    save(Record("bfloat16 products on matrix units", axis, conditions, ratios, 1.0), given.json)


if __name__ == "__main__":
    main()
