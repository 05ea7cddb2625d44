"""Options of the benchmarks, and the registry that `perta bench NAME` is made from.

They stand apart from the benchmarks, so that the command line starts without heavy libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from perta.options import ComputeConfig, Flat, Overwrite, Paths, Repeated, require_least

Level = Literal["quick", "standard", "full"]  # how much an audit looks at
LEVELS: tuple[Level, ...] = ("quick", "standard", "full")


@Flat
@dataclass(frozen=True, kw_only=True)
class Evaluated(Paths):
    """What every evaluation takes."""

    checkpoint: str
    """Checkpoint to evaluate."""
    output: Path
    """JSON file for the results."""


@Flat
@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Evaluated):
    """What all standard benchmarks take."""

    reference: Path | None = None
    """Results of the model retrained without the forget set, own or published, to compare with."""
    compat: bool = False
    """Reproduce the behaviour behind published numbers where it differs from the right one."""
    limit: int | None = None
    """Look at the first rows of every file only."""
    overwrite: Overwrite = False
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, limit=1)


@Flat
@dataclass(frozen=True, kw_only=True)
class TofuConfig(BenchmarkConfig):
    """`perta bench tofu`."""

    data: str = "locuslab/TOFU"
    """Folder with the benchmark's JSONL files, or the hub's `datasets` id."""
    forget_split: str = "forget10"
    """Which authors were to be forgotten: forget01, forget05 or forget10."""
    reference_checkpoint: str | None = None
    """Model whose loss the reference attack subtracts."""
    gradient_norms: bool = True
    """Run the gradient-norm attack, one backward pass per row."""


@Flat
@dataclass(frozen=True, kw_only=True)
class PeopleBenchConfig(BenchmarkConfig):
    """`perta bench people`."""

    data: str
    """Folder that `perta people` wrote."""
    reference_checkpoint: str | None = None
    """Model whose loss the reference attack subtracts."""
    gradient_norms: bool = True
    """Run the gradient-norm attack, one backward pass per row."""

    @property
    def forget_split(self) -> str:
        """What takes the place of TOFU's splits."""
        return "people"


@Flat
@dataclass(frozen=True, kw_only=True)
class MuseConfig(BenchmarkConfig):
    """`perta bench muse`."""

    data: str = "muse-bench"
    """Folder with the benchmark's JSONL files, or the hub's organisation."""
    corpus: Literal["news", "books"] = "news"
    """News articles or novels."""


@Flat
@dataclass(frozen=True, kw_only=True)
class AbilityConfig(Evaluated):
    """`perta bench ability`."""

    tasks: Annotated[tuple[str, ...], Repeated]
    """Tasks of lm-evaluation-harness."""
    include_path: Path | None = None
    """Folder with task files of your own."""
    limit: int | None = None
    """Look at the first rows of every task only."""
    overwrite: Overwrite = False
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass(frozen=True)
class Offer:
    """A benchmark that comes with the package: `place` is the `module:function` that runs it."""

    config: type[Any]
    summary: str
    place: str


BENCHMARKS: Mapping[str, Offer] = {
    "tofu": Offer(
        TofuConfig,
        "All TOFU metrics: forget quality, model utility, truth ratios, membership attacks.",
        "perta.stages.bench:bench_tofu",
    ),
    "people": Offer(
        PeopleBenchConfig,
        "The TOFU metrics on fictitious people of our own, of any number; nothing is downloaded.",
        "perta.stages.bench:bench_people",
    ),
    "muse": Offer(
        MuseConfig,
        "The MUSE metrics: knowledge and verbatim memorization, privacy leakage.",
        "perta.stages.bench:bench_muse",
    ),
    "ability": Offer(
        AbilityConfig,
        "General ability: tasks of lm-evaluation-harness, where it is installed.",
        "perta.stages.bench:bench_ability",
    ),
}
