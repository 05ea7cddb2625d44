"""One layer's direction from moments as matrices and as factors of few tokens.

    python benchmarks/solve.py [--width 4096] [--tokens 500] [--repeats 5] [--threads 2]

A layer of `--width` inputs and outputs, random rows, both sets of `--tokens` tokens. What bounds
the solve of perta-project, with d the width and n the tokens: d³/3 + 2 d³ operations and 8 d² bytes
with a matrix, 4 n d² + n² d operations and 8 n d bytes with a factor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from perta.methods.directions import input_direction, projected_direction
from perta.methods.method import Direction
from perta.store.measured.second_moment import factor
from records import Record, add_option, save

Solve = Callable[[Tensor, Tensor, Tensor], Direction]
METHODS: dict[str, Solve] = {
    "perta-project": lambda tau, _, retain: projected_direction(tau, retain, 3.0),
    "perta-input": lambda tau, forget, retain: input_direction(
        tau, forget, retain, 100.0, 0.01, 30.0
    ),
    "perta-input, μ = 0": lambda tau, forget, retain: input_direction(
        tau, forget, retain, 10.0, 0.01
    ),
}
"""Method -> its direction from τ and the moments of both sets."""


def timed(solve: Solve, *tensors: Tensor) -> tuple[float, Tensor]:
    """Seconds of one solve, and its Δ."""
    started = time.perf_counter()
    delta = solve(*tensors).delta
    return time.perf_counter() - started, delta


def main() -> None:
    """Time both forms of every method in turns, and compare their results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    add_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    width, tokens = options.width, options.tokens
    tau = torch.randn(width, width)
    rows = [torch.randn(tokens, width) / tokens**0.5 for _ in range(2)]
    forms = {
        "matrices": [x.t() @ x for x in rows],
        "factors": [factor(x).float() for x in rows],
        "a factor of the forget set": [factor(rows[0]).float(), rows[1].t() @ rows[1]],
    }
    ratios: dict[str, list[float]] = {}
    for method, solve in METHODS.items():
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        apart = 0.0
        for repeat in range(options.repeats + 1):
            deltas = []
            for form, (forget, retain) in forms.items():
                taken, delta = timed(solve, tau, forget, retain)
                deltas.append(delta)
                if repeat:  # the first round warms up
                    seconds[form].append(taken)
            apart = max(float((d - deltas[0]).norm() / deltas[0].norm()) for d in deltas)
        for form, values in seconds.items():
            print(f"{method:20} {form:28} {median(values):7.2f} s {sorted(values)}")
        print(f"{method:20} results differ by {apart:.1e}")
        ratios[method] = [
            whole / few for whole, few in zip(seconds["matrices"], seconds["factors"], strict=True)
        ]
    for method, values in ratios.items():
        ordered = sorted(values)
        print(
            f"{method:20} matrices / factors: {ordered[0]:.1f} {median(ordered):.1f} "
            f"{ordered[-1]:.1f} (min med max)"
        )
    save(
        Record(
            "The solve with moments as matrices against factors of few tokens",
            "time with matrices over time with factors",
            f"a layer {width} wide, {tokens} tokens in each set, {torch.get_num_threads()} threads",
            ratios,
            reference=1.0,
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
