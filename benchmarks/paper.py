"""The cost of each stage at 1B to 405B parameters, computed on paper for GPUs of one kind.

    python benchmarks/paper.py                        # print the tables
    python benchmarks/paper.py --write docs/scale.md  # put them between the page's markers

Nothing is measured here. The formulas stand in `docs/scale.md` in the notation used below.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

BEGIN, END = "<!-- tables: benchmarks/paper.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Node:
    """What one node can do at best.

    Attributes:
        gpus: number of H100 80 GB.
        memory: bytes of one GPU.
        tensor: bf16 operations per second of one GPU, dense.
        double: float64 operations per second of one GPU's tensor units.
        utilisation: share of those that real runs reach.
        bandwidth: bytes per second of one GPU's memory.
        disk: bytes per second the node reads or writes.
    """

    gpus: int = 8
    memory: float = 80e9
    tensor: float = 989e12
    double: float = 67e12
    utilisation: float = 0.4
    bandwidth: float = 3.35e12
    disk: float = 25e9


@dataclass(frozen=True)
class Model:
    """A Llama 3.1.

    Attributes:
        name: for the table.
        layers: L.
        width: d.
        inside: f, width of the MLP.
        heads: k, width of keys and of values.
        vocabulary: V, of an embedding and a head.
        tied: whether these two are one.
    """

    name: str
    layers: int
    width: int
    inside: int
    heads: int = 1024
    vocabulary: int = 128_256
    tied: bool = False

    @property
    def layer(self) -> int:
        """Weights of one layer, norms left out."""
        return self.width * (2 * self.width + 2 * self.heads + 3 * self.inside)

    @property
    def parameters(self) -> int:
        """P."""
        return self.layers * self.layer + (2 - self.tied) * self.vocabulary * self.width

    @property
    def moments(self) -> int:
        """S: numbers in all input moments; q, k and v share one, gate and up another."""
        return self.layers * (3 * self.width**2 + self.inside**2)

    @property
    def solve(self) -> float:
        """Operations of all solves: d^3/3 per moment, and 2 o d^2 per weight (o, d)."""
        d, f = self.width, self.inside
        factor = (3 * d**3 + f**3) / 3
        weights = d * (2 * d + 2 * self.heads + 2 * f) * d + d * f * f
        return self.layers * (factor + 2 * weights)


MODELS = (
    Model("1B", 16, 2048, 8192, heads=512, tied=True),
    Model("8B", 32, 4096, 14_336),
    Model("70B", 80, 8192, 28_672),
    Model("405B", 126, 16_384, 53_248),
)


@dataclass(frozen=True)
class Work:
    """What is to be forgotten.

    Attributes:
        forget: tokens of the forget set.
        share: of the forget set in all tuning tokens.
        batch: tokens per step of tuning.
        at_once: tokens per pass of importance, moments and evaluation, which the package bounds.
        epochs: of tuning, for the forget checkpoint and for retraining alike.
        sample: retain tokens that importance and moments see, per forget token; moments once for
            all requests.
        evaluated: tokens scored by the evaluation, prompts included.
        generated: tokens it generates, in batches of `parallel` answers.
        parallel: answers generated at a time.
    """

    forget: float = 10e6
    share: float = 0.01
    batch: float = 65_536
    at_once: float = 4_096
    epochs: float = 5
    sample: float = 2
    evaluated: float = 2e6
    generated: float = 0.4e6
    parallel: float = 256

    @property
    def measured(self) -> float:
        """N: tokens that importance sees."""
        return self.forget + self.protected

    @property
    def protected(self) -> float:
        """R: tokens that moments see."""
        return self.forget * self.sample

    @property
    def retain(self) -> float:
        """Tokens of the retain set."""
        return self.forget * (1 / self.share - 1)


@dataclass(frozen=True)
class Stage:
    """What a stage takes.

    Attributes:
        name: for the table.
        operations: bf16.
        traffic: bytes read and written in GPU memory.
        disk: bytes read and written on disk.
        memory: bytes of GPU memory at the peak, activations apart.
        double: float64 operations.
    """

    name: str
    operations: float
    traffic: float
    disk: float
    memory: float
    double: float = 0.0


def stages(model: Model, work: Work) -> list[Stage]:
    """Every stage, retraining first."""
    size, measured = float(model.parameters), work.measured
    protected = work.protected

    def tuning(name: str, tokens: float) -> Stage:
        seen = work.epochs * tokens
        # Weights read forward and backward; AdamW reads and writes 28 bytes a parameter.
        traffic = seen / work.batch * (4 + 28) * size
        return Stage(name, 6 * size * seen, traffic, 4 * size, 16 * size)

    return [
        tuning("retraining, for comparison", work.retain),
        tuning("forget fine-tune", work.forget),
        Stage(
            "importance, one order",
            6 * size * measured,
            # The sums are read and written once per pass; gradients stay in registers.
            (4 + 8) * measured / work.at_once * size,
            (2 + 2 * 4) * size,
            (2 + 4) * size,
        ),
        Stage(
            "retain moments, once",
            # Products of bfloat16 numbers, summed in float32 by units for bfloat16.
            2 * (size + model.moments) * protected,
            (2 * size + 16 * model.moments) * protected / work.at_once,
            2 * size + 4 * model.moments,
            2 * size + 8 * model.moments,
        ),
        Stage(
            "solve of `perta-project`",
            0.0,
            # Base and tuned weights in, a float32 direction out; the float64 work stays in cache
            # blocks, a few sweeps over its operands.
            3 * 8 * (2 * model.moments + 2 * size),
            4 * model.moments + 8 * size,
            8 * (3 * model.inside**2 + 3 * model.inside * model.width),
            double=model.solve,
        ),
        Stage("edit, `perta-grad`", 6 * size, 16 * size, 16 * size, 0.0),
        Stage("edit, `perta-project`", 2 * size, 8 * size, 8 * size, 0.0),
        Stage(
            "evaluation",
            2 * size * (work.evaluated + work.generated),
            2 * size * (work.evaluated / work.at_once + work.generated / work.parallel),
            2 * size,
            2 * size,
        ),
    ]


def times(stage: Stage, node: Node) -> dict[str, float]:
    """Seconds each resource is busy."""
    rate = node.gpus * node.utilisation
    arithmetic = stage.operations / node.tensor + stage.double / node.double
    return {
        "arithmetic": arithmetic / rate,
        "GPU memory": stage.traffic / (node.gpus * node.bandwidth),
        "disk": stage.disk / node.disk,
    }


def table(model: Model, work: Work, node: Node) -> str:
    """One model as Markdown."""
    lines = [
        f"### {model.name}: {model.parameters / 1e9:.1f}B parameters\n",
        "| stage | operations | GPU memory traffic | disk | memory (nodes) | time | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    listed = stages(model, work)
    for stage in listed:
        busy = times(stage, node)
        bound = max(busy, key=lambda name: busy[name])
        nodes = math.ceil(stage.memory / (node.gpus * node.memory)) or 1
        cells = (
            stage.name,
            f"{stage.operations + stage.double:.1e}",
            amount(stage.traffic),
            amount(stage.disk),
            f"{amount(stage.memory)} ({nodes})" if stage.memory else "bounded",
            duration(busy[bound]),
            bound,
        )
        lines.append(f"| {' | '.join(cells)} |")
    seconds = {stage.name: max(times(stage, node).values()) for stage in listed}
    whole = seconds["retraining, for comparison"]
    for name, parts in (
        ("perta-grad", ("importance, one order", "edit, `perta-grad`")),
        ("perta-project", ("solve of `perta-project`", "edit, `perta-project`")),
    ):
        total = seconds["forget fine-tune"] + sum(seconds[part] for part in parts)
        lines.append(
            f"\n`{name}` without evaluation: {duration(total)}, {total / whole:.1%} of retraining."
        )
    return "\n".join(lines)


GPUS = (1, 8, 16)


def by_gpus(models: Sequence[Model], work: Work, node: Node) -> str:
    """Time of every stage but retraining on several numbers of GPUs, as Markdown."""
    columns = [(model, replace(node, gpus=gpus)) for model in models for gpus in GPUS]
    titles = [f"{model.name}, {node.gpus} GPU{'s' * (node.gpus > 1)}" for model, node in columns]
    lines = ["### By the number of GPUs\n", f"| stage | {' | '.join(titles)} |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for row in zip(*(stages(model, work)[1:] for model, _ in columns), strict=True):
        pairs = zip(row, columns, strict=True)
        cells = [duration(max(times(stage, node).values())) for stage, (_, node) in pairs]
        lines.append(f"| {row[0].name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def amount(size: float) -> str:
    """Bytes with a unit."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """Seconds with a unit."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.2g} s"


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="page with the two markers")
    options = parser.parse_args()
    tables = [table(model, Work(), Node()) for model in MODELS]
    text = "\n\n".join([*tables, by_gpus(MODELS[:3], Work(), Node())])
    if options.write is None:
        print(text)
        return
    head, _, rest = options.write.read_text("utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    options.write.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
