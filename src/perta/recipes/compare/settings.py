"""Options of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from perta.options import (  # noqa: F401 - annotations of inherited fields are read here
    ComputeConfig,
    DataConfig,
    Flat,
    Hidden,
    LossOn,
    Paths,
    Repeated,
    Schedule,
    TuneConfig,
    TunedType,
    require,
    require_least,
)


@Flat
@dataclass(frozen=True, kw_only=True)
class CompareTune(TuneConfig):
    """Fine-tuning on the few rows of a comparison."""

    # Fields, not values of an instance: one option on the command line must not reset the other.
    epochs: int = 10
    """Most passes over the data."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    seed: Annotated[int, Parameter(parse=False)] = 0
    """Each draw has its own: see `--seeds`."""


@Flat
@dataclass(frozen=True, kw_only=True)
class CompareConfig(Paths):
    """`perta bench compare`.

    Rows are yours with `--forget` and `--retain`, TOFU's with `--tofu`, or else fictitious people.
    Every second retain row may be used by the methods; retention is reported on the others, which
    none of them sees.
    """

    base: str
    """Model to tune on the data: folder, GGUF file or hub id."""
    output: Path
    """Folder for models, results and tables; a second run reuses what is finished."""
    methods: Annotated[tuple[str, ...], Repeated] = (
        "tv",
        "perta-grad",
        "perta-fisher",
        "perta-project",
    )
    """Methods, each with settings where wanted: `perta-project:rho=10,tokens=answer`. Settings are
    those of the weighting, `tokens`, `at` (base or full), `share` (of the retain rows; 0, with
    `general=true`, for none), `general` (true or false: see `--general`) and `forget_seeds`; for
    training methods those of training, as in `npo:beta=0.05`."""
    checkpoint: Annotated[tuple[str, ...], Repeated] = ()
    """Model that other code made of a seed's full model, as NAME=PATH, measured as it is beside the
    methods. Where there are several seeds, `{seed}` in the path stands for each."""
    seeds: Annotated[tuple[int, ...], Repeated] = (0, 1, 2)
    """Seeds of rows and training; every seed has rows and models of its own."""
    forget: str | None = None
    """Rows of your own to forget: data file or `datasets` id. Only training differs between seeds
    then."""
    retain: str | None = None
    """With `--forget`: rows of your own to keep."""
    general: str | None = None
    """Text that has nothing to do with the rows, for methods with `general=true`, which add its
    moments to those of the retain rows: data file or `datasets` id."""
    tofu: Path | None = None
    """Folder with TOFU's JSONL files."""
    tofu_split: Literal["forget01", "forget05", "forget10"] | None = None
    """With `--tofu`: the benchmark's own split, whole; only training differs between seeds then.
    Without it, every seed has slices of its own."""
    forget_rows: int = 20
    """With `--tofu` and no split: rows to forget; 20 are one author."""
    retain_rows: int = 60
    """With `--tofu` and no split: rows to keep."""
    people: int = 12
    """Without data of your own and `--tofu`: fictitious people."""
    questions: int = 5
    """Questions about each of these people."""
    forget_people: int = 2
    """How many of these people are to be forgotten."""
    tries: int = 6
    """Most strengths tried to make a method forget as much as retraining does."""
    equal_by: Literal["facts", "answers"] = "facts"
    """What has to be as probable as in the retrained model for forgetting to be equal: each fact in
    one of 64 samples, or each answer; the mean over rows. Most of an answer is the sentence around
    its fact."""
    equal_tolerance: float = 0.01
    """Distance from the retrained model's mean that counts as equal."""
    fixed: bool = True
    """Measure at the method's default strength as well."""
    relearn_steps: int = 6
    """Steps of fine-tuning on a quarter of the forget rows, before the probability of the others
    is measured again; 0 leaves resistance to relearning out."""
    relearn_learning_rate: float | None = None
    """Learning rate of that, which moves all parameters [default: that of tuning, or with LoRA,
    whose rates are too large for it, 1e-4]."""
    relearn_tries: int = 3
    """Most strengths tried for that, 0 for none."""
    suite: bool = False
    """Run the whole TOFU evaluation (forget quality, model utility, attacks) on every model; not
    for rows of your own, which lack the wrong answers it needs."""
    suite_limit: int | None = None
    """Rows of every file that it looks at."""
    ability_tasks: Annotated[tuple[str, ...], Repeated] = ()
    """Tasks of lm-evaluation-harness for the general ability of every model, where it is
    installed."""
    save_dtype: TunedType = "float32"
    """Type the tuned models are stored in: float32, or the base's own with `base`."""
    title: str = "Comparison of unlearning methods"
    """Heading of the report."""
    overwrite: bool = False
    """Replace rows and models that an earlier run with other settings left in the folder."""
    tune: CompareTune = field(default_factory=CompareTune)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.forget is None) == (self.retain is None)
        require(both, "forget", self.forget, "given together with --retain, or neither")
        alone = self.forget is None or self.tofu is None
        require(alone, "forget", self.forget, "given without --tofu: rows are of one or the other")
        has_suite = self.forget is None or not self.suite
        require(has_suite, "suite", self.suite, "off for rows of your own (--forget)")
        needs_folder = self.tofu_split is not None and self.tofu is None
        require(not needs_folder, "tofu-split", self.tofu_split, "given together with --tofu")
        require(len(self.methods) > 0, "methods", self.methods, "at least one")
        require(len(self.seeds) > 0, "seeds", self.seeds, "at least one")
        seeds = self.seeds
        require(min(seeds) >= 0 and len(set(seeds)) == len(seeds), "seeds", seeds, "0, 1, 2, …")
        require_least(self, forget_rows=2, retain_rows=2, tries=1)
        require_least(self, relearn_steps=0, relearn_tries=0)
        tolerance = self.equal_tolerance
        require(0 < tolerance < 1, "equal-tolerance", tolerance, "in (0, 1)")
        rate = self.relearn_learning_rate
        require(rate is None or rate > 0, "relearn-learning-rate", rate, "above 0")
