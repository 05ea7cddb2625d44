"""The edit against the speed of the disk cache, and against mergekit's task arithmetic.

    python benchmarks/edit.py --work /tmp/edit-benchmark [--mergekit-python VENV/bin/python]

Makes three random checkpoints with the shapes of Llama-3.2-1B (bfloat16, tied embeddings, three
shards each) and two float32 importance folders, then measures in turn, several times over:

    floor        read the three checkpoints with cat and copy one with cp
    perta tv     the plain task arithmetic edit
    floor+       the same floor, reading the two importance folders as well
    perta-grad   the weighted edit
    mergekit     task arithmetic with float32 arithmetic, where mergekit is installed

Every run is a process of its own, so its peak resident memory is its own. Times leave imports
aside for both tools; `process` times do not. Files are in the disk cache: before each run its
inputs are read and earlier output is flushed, because mergekit's memory drives files out. The
whole takes about 25 GB of disk and, to stay in the cache, of memory; `--layers 4` makes
everything smaller.

mergekit: `python -m venv VENV && VENV/bin/pip install torch mergekit==0.1.5`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import Record, add_option, save

CHECKPOINTS = ("base", "full", "forget")
IMPORTANCE = ("forget-importance", "retain-importance")
SCALING_COEF = 1.0

PERTA_RUN = "import edit, sys; edit.edit_once(*sys.argv[1:])"

MERGEKIT_RUN = """
import json, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
work, output = sys.argv[1], sys.argv[2]
config = MergeConfiguration.model_validate(yaml.safe_load(f'''
merge_method: task_arithmetic
base_model: {work}/base
models:
  - model: {work}/full
    parameters: {{weight: 1.0}}
  - model: {work}/forget
    parameters: {{weight: -1.0}}
parameters: {{normalize: false}}
dtype: float32
out_dtype: bfloat16
'''))
started = time.perf_counter()
run_merge(config, output, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
print(json.dumps(time.perf_counter() - started))
"""


@dataclass(frozen=True)
class Run:
    """One measured process.

    Attributes:
        seconds: duration, imports aside.
        process_seconds: duration of the whole process.
        peak_mb: largest resident memory, in 10^6 bytes.
    """

    seconds: float
    process_seconds: float
    peak_mb: float


def llama_config(layers: int) -> dict[str, Any]:
    """The configuration of Llama-3.2-1B, with another number of layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes of the model."""
    yield "model.embed_tokens.weight", (128256, 2048)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (2048,)
        yield prefix + "mlp.down_proj.weight", (2048, 8192)
        yield prefix + "mlp.gate_proj.weight", (8192, 2048)
        yield prefix + "mlp.up_proj.weight", (8192, 2048)
        yield prefix + "post_attention_layernorm.weight", (2048,)
        yield prefix + "self_attn.k_proj.weight", (512, 2048)
        yield prefix + "self_attn.o_proj.weight", (2048, 2048)
        yield prefix + "self_attn.q_proj.weight", (2048, 2048)
        yield prefix + "self_attn.v_proj.weight", (512, 2048)
    yield "model.norm.weight", (2048,)


def layout(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in three shards of about the same size."""
    listed = list(shapes(layers))
    total = sum(numel(shape) for _, shape in listed)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[], [], []]
    done = 0
    for name, shape in listed:
        shards[min(2, done * 3 // total)].append((name, shape))
        done += numel(shape)
    return shards


def numel(shape: Sequence[int]) -> int:
    """Number of values."""
    result = 1
    for size in shape:
        result *= size
    return result


def make_inputs(work: Path, layers: int) -> None:
    """Write the random checkpoints and importance folders, unless they are there."""
    if (work / "done.json").is_file() and json.loads((work / "done.json").read_text()) == layers:
        return
    shutil.rmtree(work, ignore_errors=True)
    shards = layout(layers)
    for index, name in enumerate(CHECKPOINTS):
        folder = work / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(llama_config(layers)))
        write_shards(folder, shards, index)
    for index, name in enumerate(IMPORTANCE):
        folder = work / name / "order-1"
        folder.mkdir(parents=True)
        sidecar = {"orders": [1.0], "reduction": "mean_of_power", "model_fingerprint": "random"}
        (work / name / "importance.json").write_text(json.dumps(sidecar))
        write_shards(folder, shards, 10 + index)
    (work / "done.json").write_text(json.dumps(layers))


def write_shards(folder: Path, shards: Sequence[Sequence[tuple[str, Any]]], kind: int) -> None:
    """Write one checkpoint (kind 0 to 2) or importance (10 and up) shard by shard."""
    from safetensors.torch import save_file

    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: random_tensor(name, shape, kind) for name, shape in shard},
            folder / file,
            {"format": "pt"},
        )
        weight_map.update({name: file for name, _ in shard})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensor(name: str, shape: tuple[int, ...], kind: int) -> Any:
    """Base weights; tuned weights, which are base weights with a little noise; or importance."""
    import zlib

    import torch

    seed = zlib.crc32(name.encode())
    if kind >= 10:
        generator = torch.Generator().manual_seed(seed + kind)
        return torch.randn(shape, generator=generator).square_().mul_(1e-6)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).mul_(0.02)
    if kind == 0:
        return base.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed + kind)
    noise = torch.randn(shape, generator=generator).mul_(1e-3)
    return base.add_(noise).to(torch.bfloat16)


def weights(folder: Path) -> list[Path]:
    """Every safetensors file under a folder."""
    return sorted(folder.rglob("*.safetensors"))


def read_with_cat(work: Path, readings: Sequence[str]) -> None:
    """Read the files of some inputs, which also brings them into the disk cache."""
    files = [str(file) for name in readings for file in weights(work / name)]
    # A shell redirection, because cat of this many files must not pass through Python.
    with Path(os.devnull).open("wb") as null:
        subprocess.run(["cat", *files], stdout=null, check=True)


def floor(work: Path, readings: Sequence[str]) -> float:
    """Seconds to read inputs with cat and copy one checkpoint with cp."""
    target = work / "floor"
    started = time.perf_counter()
    read_with_cat(work, readings)
    subprocess.run(["cp", "-r", str(work / "full"), str(target)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def run(work: Path, python: str, code: str, output: Path, *arguments: str) -> Run:
    """Run one edit in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), environment.get("PYTHONPATH")))
    )
    command = [python, "-c", code, str(work), str(output), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed with status {process.returncode}: {' '.join(command[:2])} ...")
    unit = 1 if platform.system() == "Darwin" else 1024
    seconds = float(text.decode().strip().splitlines()[-1])
    return Run(seconds, elapsed, usage.ru_maxrss * unit / 1e6)


def edit_once(work: str, output: str, method: str, threads: str) -> None:
    """Edit in this process and print the seconds it took, imports aside."""
    from perta.engine.edit.plan import EditInputs
    from perta.engine.edit.write import write_edit
    from perta.options import WeightingConfig
    from perta.progress import set_quiet
    from perta.store.atomic import atomic_folder

    set_quiet(True)
    folders = {name: Path(work) / name for name in CHECKPOINTS + IMPORTANCE}
    started = time.perf_counter()
    inputs = EditInputs(
        folders["full"],
        folders["base"],
        (folders["forget"],),
        folders["forget-importance"],
        folders["retain-importance"],
    )
    with atomic_folder(Path(output)) as partial:
        write_edit(partial, inputs, WeightingConfig(method=method), threads=int(threads) or None)
    print(json.dumps(time.perf_counter() - started))


def differing_values(work: Path) -> tuple[int, int, int, int]:
    """Compare the stored values of the two tools.

    Returns:
        Values in all; values that differ; and of these, how many perta and how many mergekit
        wrote as the exact result (float64) rounded once.
    """
    import torch

    from perta.store.checkpoint import open_index, read_tensor

    folders = ("tv", "mergekit", *CHECKPOINTS)
    indexes = {name: open_index(work / name).tensors for name in folders}
    if set(indexes["tv"]) != set(indexes["mergekit"]):
        raise SystemExit("the tools wrote different tensors")
    total = different = ours_exact = theirs_exact = 0
    for name in indexes["tv"]:
        ours, theirs = (read_tensor(indexes[folder][name]) for folder in ("tv", "mergekit"))
        total += ours.numel()
        places = (ours.view(torch.int16) != theirs.view(torch.int16)).flatten().nonzero()
        if len(places) == 0:
            continue
        base, full, forget = (
            read_tensor(indexes[folder][name]).flatten()[places].double() for folder in CHECKPOINTS
        )
        exact = (full - SCALING_COEF * (forget - base)).to(torch.bfloat16)
        different += len(places)
        ours_exact += int((ours.flatten()[places] == exact).sum())
        theirs_exact += int((theirs.flatten()[places] == exact).sum())
    return total, different, ours_exact, theirs_exact


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Minimum, median and maximum."""
    picked = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{value:.{digits}f}" for value in picked)


def measure(
    work: Path, repeats: int, threads: int, mergekit_python: str | None, with_importance: bool
) -> dict[str, list[Any]]:
    """Measure everything in turn, several times over."""
    weighted = CHECKPOINTS + IMPORTANCE

    def edit_by(method: str) -> Run:
        arguments = (PERTA_RUN, work / method, method, str(threads))
        return run(work, sys.executable, *arguments)

    steps: dict[str, tuple[Sequence[str], Callable[[], Any]]] = {
        "floor": (CHECKPOINTS, lambda: floor(work, CHECKPOINTS)),
        "tv": (CHECKPOINTS, lambda: edit_by("tv")),
    }
    if with_importance:
        steps["floor+"] = (weighted, lambda: floor(work, weighted))
        steps["perta-grad"] = (weighted, lambda: edit_by("perta-grad"))
    if mergekit_python:
        output = work / "mergekit"
        steps["mergekit"] = (CHECKPOINTS, lambda: run(work, mergekit_python, MERGEKIT_RUN, output))
    results: dict[str, list[Any]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name, (readings, step) in steps.items():
            shutil.rmtree(work / name, ignore_errors=True)
            os.sync()
            read_with_cat(work, readings)
            results[name].append(step())
            if name == "perta-grad":
                shutil.rmtree(work / name)
            last = results[name][-1]
            print(f"  {repeat + 1}/{repeats} {name}: {last}", file=sys.stderr, flush=True)
    return results


def report(results: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Print times, memory and the ratios that matter, minimum / median / maximum.

    Returns:
        The ratios in every repeat.
    """
    print(f"\n{'':12}{'seconds':>24}{'process seconds':>24}{'peak MB':>24}")
    for name, values in results.items():
        if isinstance(values[0], Run):
            columns = (
                spread([value.seconds for value in values]),
                spread([value.process_seconds for value in values]),
                spread([value.peak_mb for value in values], 0),
            )
        else:
            columns = (spread(values), "", "")
        print(f"{name:12}" + "".join(f"{column:>24}" for column in columns))
    print("\nratios within one repeat, minimum / median / maximum")
    tv = [value.seconds for value in results["tv"]]
    ratios = {"tv / floor": divided(tv, results["floor"])}
    if "perta-grad" in results:
        weighted = [value.seconds for value in results["perta-grad"]]
        ratios["perta-grad / floor+"] = divided(weighted, results["floor+"])
    if "mergekit" in results:
        other = [value.seconds for value in results["mergekit"]]
        ratios["mergekit / tv"] = divided(other, tv)
    for name, values in ratios.items():
        print(f"  {name:21}{spread(values)}")
    return ratios


def divided(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Ratios of values measured in the same repeat."""
    return [one / other for one, other in zip(upper, lower, strict=True)]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16, help="16 are 1.2 billion parameters")
    parser.add_argument("--threads", type=int, default=0, help="0: the edit's own default")
    parser.add_argument("--mergekit-python", help="python of an environment with mergekit")
    parser.add_argument("--no-importance", action="store_true", help="leave perta-grad out")
    parser.add_argument("--keep", action="store_true", help="keep the files for the next run")
    add_option(parser)
    options = parser.parse_args()
    work = options.work.absolute()
    # In a process of its own: on Linux a new process inherits the peak memory of its parent.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_inputs, args=(work, options.layers)
    )
    maker.start()
    maker.join()
    if maker.exitcode != 0:
        raise SystemExit("the inputs could not be made")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for folder in ("full", "forget-importance"):
        size = sum(file.stat().st_size for file in weights(work / folder))
        print(f"{folder}: {size / 1e9:.2f} GB in {len(weights(work / folder))} files")
    results = measure(
        work,
        options.repeats,
        options.threads,
        options.mergekit_python,
        not options.no_importance,
    )
    save(
        Record(
            "The edit against copying the files, and against mergekit",
            "ratio of times; floor: the inputs read with cat and one copied with cp",
            f"{options.layers} layers of Llama-3.2-1B's shape in bfloat16, {os.cpu_count()} cores",
            report(results),
            reference=1.0,
        ),
        options.json,
    )
    if options.mergekit_python:
        total, different, ours, theirs = differing_values(work)
        print(f"  stored values: {total}, of which perta tv and mergekit differ in {different}")
        if different:
            print(f"  exact there: perta tv {ours}, mergekit {theirs}")
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
