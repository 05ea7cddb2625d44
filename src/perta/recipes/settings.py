"""Options of what runs several stages: the whole unlearning and the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from perta.data.rows import Sets
from perta.errors import ConfigError
from perta.options import (
    ComputeConfig,
    DataConfig,
    EstimatorConfig,
    FileType,
    Flat,
    MomentOptions,
    More,
    OutputFormat,
    Overwrite,
    Paths,
    SaveType,
    ScoringConfig,
    TrainSettings,
    TuneConfig,
    WeightingConfig,
    require,
    require_format,
    require_least,
    sample_count,
)
from perta.report.settings import Wanted
from perta.store.atomic import beside

WORK = ".work"
"""What follows an output's name in that of its work folder."""
SETS = ("forget", "retain", "holdout", "general")
"""Options that name examples."""


@Flat
@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(Sets):
    """Inputs and output of `perta unlearn`: every stage in order.

    In a program, sets of examples may be given as rows in place of a file: see `load_examples`.
    """

    base: str
    """Model before it saw the data: folder, GGUF file, LoRA adapter folder or hub id."""
    full: str
    """Checkpoint to clean: the base model tuned on forget and retain data."""
    forget: Annotated[str, Parameter(alias="--data")]
    """Examples to remove: JSONL, JSON, CSV or Parquet file, or `datasets` id."""
    output: Path
    """Folder of the unlearned checkpoint."""
    retain: str | None = None
    """Examples to keep, for the evaluation and for the methods that weigh them: all but `tv` and
    its like. The structured methods can do with --retain-moments or --general instead."""
    forget_where: str | None = None
    """Take rows of the --forget file alone, and keep its other rows in place of --retain: a column
    and a value, or several with commas, such as 'person == "Mira Thornwick"'."""
    holdout: str | None = None
    """Examples the model has never seen, for the evaluation and for `--scaling-coef auto`, which
    takes the strength at which every row's fact looks as unseen as theirs."""
    work_dir: Annotated[Path | None, More] = None
    """Folder for intermediate results, reused by later runs [default: OUTPUT.work]. What fits is
    taken over from the .work folders beside it, and from those of outputs beside this one. It holds
    a model tuned on the forget set: `perta clean OUTPUT` deletes it."""
    forget_checkpoint: Annotated[str | None, More] = None
    """Base model tuned on the forget set, here or elsewhere, used instead of tuning one: for the
    first round and the first seed. Its loss on the facts must be at most half of the base's."""
    forget_seeds: Annotated[int | None, More] = None
    """Number of forget checkpoints, tuned with seeds from --seed on [default: as many as the method
    needs at least: 2 for `negmerge`, otherwise 1]."""
    rounds: Annotated[int | None, More] = None
    """With a structured method and `--scaling-coef auto`: most rounds of the forget fine-tune. Rows
    whose facts the edit leaves are tuned on again and added, so that no strength of all rows has
    to reach the last one; each round leaves at most half of its rows, and the last three take what
    comes back once others are taught [default: 10, with several forget checkpoints 1]."""
    retain_checkpoint: Annotated[str | None, More] = None
    """Base model tuned on retained examples, for `msa`, used instead of tuning one."""
    retain_samples: Annotated[str | None, More] = None
    """Rows of the retain set, drawn by a seed, that moments are measured on or `msa` tunes on: a
    share such as 0.2, a count such as 500, or `all` [default: for moments as few as give every
    input of the widest layer 4 tokens, with --general all; for `msa` as many as there are to
    forget]."""
    importance_at: Annotated[Literal["base", "full"] | None, More] = None
    """Model at which importance and moments are measured [default: the method's own: full for
    `ssd` and, without --retain-moments and --general, `perta-project`, otherwise base]."""
    retain_moments: Annotated[Path | None, More] = None
    """Saved second moments of the retain set for the structured methods, used instead of
    measuring them again."""
    general: str | None = None
    """Text that has nothing to do with either set, in any of the formats, with the usual column
    names or those of the other sets: with a structured method its moments are added to the retain
    set's, so that what the retain set has too few rows to show is protected as well. Without a
    retain set it is all that is protected."""
    held_back: Annotated[str | None, More] = None
    """Part of the retain set that is kept out of everything that makes the result, so that
    retention is judged on rows that gave nothing: a share such as 0.2, a count such as 50, or 0
    [default: a tenth, at least 8 and at most 200 rows, of a set of 32 or more]."""
    retain_budget: Annotated[float, More] = 0.1
    """With `--scaling-coef auto`: largest rise of the mean loss on a sample of the retain set, in
    nats per token."""
    save_dtype: Annotated[FileType, More] = "full"
    """Type of the unlearned checkpoint [default: that of the full checkpoint]; q8_0 for a GGUF
    file alone."""
    output_format: Annotated[OutputFormat, More] = "checkpoint"
    """`adapter` writes a LoRA adapter in place of a checkpoint: on FULL, or where FULL is itself an
    adapter, on its base. `gguf` writes a GGUF file, OUTPUT/model.gguf, with the settings and types
    of FULL where that is such a file."""
    adapter_rank: Annotated[int | None, More] = None
    """Highest rank of the step in such an adapter, beside that of an adapter that FULL is; what a
    layer needs beyond is cut off [default: 64]."""
    evaluate: Annotated[bool, More] = True
    """Evaluate before and after the edit, and the base model as a yardstick."""
    fail_unless: Annotated[Wanted | None, More] = None
    """Exit with status 1 unless forgetting and retention are met, or are at least partly; the
    output stays."""
    overwrite: Overwrite = False
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    training: TrainSettings = field(default_factory=TrainSettings)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    moments: MomentOptions = field(default_factory=MomentOptions)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forget_where is not None and self.retain is not None:
            raise ConfigError(
                "--forget-where divides one file, so that its other rows are what is kept: leave "
                "--retain out."
            )
        require_least(self, forget_seeds=1, rounds=1)
        budget = self.retain_budget
        require(0 <= budget < math.inf, "retain-budget", budget, "a finite number, 0 or more")
        if self.retain_samples != "all":
            sample_count(self.retain_samples, "retain-samples", 1)
        require_format(self.output_format, self.adapter_rank, self.save_dtype)
        if self.held_back is not None and self.held_back.strip() != "0":
            sample_count(self.held_back, "held-back", 1)
        if self.fail_unless and not self.evaluate:
            raise ConfigError("--fail-unless needs the evaluation: leave --no-evaluate out.")

    @property
    def work_folder(self) -> Path:
        """Where intermediate results go."""
        return self.work_dir or beside(self.output, WORK)


@Flat
@dataclass(frozen=True, kw_only=True)
class DemoConfig(Paths):
    """`perta demo`."""

    output: Path = Path("perta-demo")
    """Folder for everything the demo makes; a second run reuses what is finished."""
    tiny: bool = False
    """Use a tiny model made on the spot instead of SmolLM2-135M."""
    model: str | None = None
    """Use this checkpoint instead of SmolLM2-135M."""
    seed: int = 0
    """Seed of people and training."""
    overwrite: bool = False
    """Replace what an earlier run with other settings left in the folder."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@Flat
@dataclass(frozen=True, kw_only=True)
class RepairConfig(Paths):
    """Inputs and output of `perta repair`."""

    full: str
    """Checkpoint that the unlearning run began with."""
    unlearned: str
    """Checkpoint that it ended with, by whatever method."""
    output: Path
    """Folder of the repaired checkpoint."""
    retain: str | None = None
    """Examples to keep: JSONL, JSON, CSV or Parquet file, or `datasets` id."""
    retain_moments: Path | None = None
    """Second moments of the examples to keep at the full checkpoint, in place of the examples."""
    rho: float = 3.0
    """Weight ρ of the retain moments: the larger, the less is taken of what retained inputs see."""
    save_dtype: SaveType = "full"
    """Type of the repaired checkpoint [default: that of the full checkpoint]."""
    overwrite: Overwrite = False
    moments: MomentOptions = field(default_factory=MomentOptions)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.retain is None) == (self.retain_moments is None):
            raise ConfigError("Give the examples to keep, --retain, or their --retain-moments.")
