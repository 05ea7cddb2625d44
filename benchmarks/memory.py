"""Peak memory of each stage as the model grows.

    python benchmarks/memory.py [--sizes 34M 68M 135M] [--threads 2]

Every stage runs as its own process through the command line; the figure is that process's
largest resident set. `import` is a process that loads the libraries only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from models import SIZES, write_people_sets, write_random_model
from records import Record, add_option, save

PROBE = """
import runpy, sys
from pathlib import Path
target, module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    Path(target).write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
"""Runs a module and writes its own peak in kB. What the system reports of a child that has ended
counts the memory of the parent it was forked from as well."""


def peak(module: list[str], threads: int | None) -> float:
    """Largest resident set of a module run with arguments, in MB."""
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.NamedTemporaryFile() as target:
        command = [sys.executable, "-c", PROBE, target.name, *module]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return int(target.read()) / 1024


def main() -> None:
    """Print one line per model size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["34M", "68M", "135M"])
    parser.add_argument("--threads", type=int)
    add_option(parser)
    options = parser.parse_args()
    stages = ("finetune", "importance", "edit", "evaluate")
    values: dict[str, list[float]] = {}
    print("peak resident memory, MB")
    print("parameters | weights | import " + " ".join(f"{stage:>10}" for stage in stages))
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            count = write_random_model(work / "base", size)
            write_people_sets(work, people=4, questions=2, forget_people=1)
            forget, retain = (str(work / f"{part}.jsonl") for part in ("forget", "retain"))
            base = str(work / "base")
            tune = ["finetune", "--base", base, "--epochs", "1", "--data"]
            run = ["perta", "--quiet"]
            libraries = ["transformers.models.auto.modeling_auto"]
            peaks = [peak(libraries, options.threads)]
            peaks.append(peak([*run, *tune, forget, "--output", str(work / "f")], options.threads))
            peak([*run, *tune, retain, "--output", str(work / "full")], options.threads)
            for part in (forget, retain):
                place = str(work / f"i{Path(part).stem}")
                last = peak(
                    [*run, "importance", "--checkpoint", base, "--data", part, "--output", place],
                    options.threads,
                )
            peaks.append(last)
            peaks.append(
                peak(
                    [
                        *run,
                        "edit",
                        "--full",
                        str(work / "full"),
                        "--base",
                        base,
                        "--forget-checkpoint",
                        str(work / "f"),
                        "--forget-importance",
                        str(work / "iforget"),
                        "--retain-importance",
                        str(work / "iretain"),
                        "--output",
                        str(work / "out"),
                    ],
                    options.threads,
                )
            )
            peaks.append(
                peak(
                    [
                        *run,
                        "evaluate",
                        "--checkpoint",
                        str(work / "out"),
                        "--forget",
                        forget,
                        "--output",
                        str(work / "r.json"),
                        "--max-new-tokens",
                        "8",
                    ],
                    options.threads,
                )
            )
        for stage, value in zip(("libraries", *stages), peaks, strict=True):
            values[f"{stage}, {count / 1e6:.0f}M"] = [value]
        figures = " ".join(f"{value:10.0f}" for value in peaks[1:])
        print(
            f"{count / 1e6:9.0f}M | {4 * count / 2**20:7.0f} | {peaks[0]:6.0f} {figures}",
            flush=True,
        )
    claim = "Peak memory of each stage as the model grows"
    labels = sorted(values, key=lambda label: ("libraries", *stages).index(label.split(",")[0]))
    ordered = {label: values[label] for label in labels}
    conditions = f"random Llamas in float32, {options.threads or os.cpu_count()} threads"
    save(Record(claim, "largest resident set, MB", conditions, ordered), options.json)


if __name__ == "__main__":
    main()
