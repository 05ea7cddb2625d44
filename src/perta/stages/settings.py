"""Inputs and outputs of every stage; the concerns they are made of are in `options`.

They stand apart from the stages, so that the command line starts without heavy libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from perta.data.rows import Sets
from perta.errors import ConfigError
from perta.evidence.settings import Evaluated, Level
from perta.options import (
    MOST_ORDER,
    ComputeConfig,
    DataConfig,
    Device,
    EstimatorConfig,
    FileType,
    Flat,
    FrozenType,
    MethodText,
    MomentOptions,
    OutputFormat,
    Overwrite,
    Paths,
    Repeated,
    SaveType,
    ScoringConfig,
    SumsOn,
    TrainSettings,
    TuneConfig,
    TunedType,
    WeightingConfig,
    require,
    require_format,
    require_least,
    require_unicode,
)


@Flat
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Sets):
    """Inputs and output of `perta train`."""

    method: MethodText
    """Training method, with settings as in `npo:beta=0.05`; `perta methods` lists them, and
    with a name the settings of one. In a program it may be the method itself."""
    output: Path
    """Folder of the unlearned checkpoint."""
    full: str | None = None
    """Checkpoint to clean; for `influence` a LoRA adapter folder; not used by `retrain`."""
    base: str | None = None
    """Model before it saw the data, for `retrain`; for `influence` the adapter's base [default:
    the one the adapter names]."""
    forget: str | None = None
    """Examples to remove: JSONL, JSON, CSV or Parquet file, or `datasets` id; not used by
    `retrain` and `retain-finetune`."""
    retain: str | None = None
    """Examples to keep; not used by `ga`, `npo`, `undial` and `ce-u`."""
    overwrite: Overwrite = False
    save_dtype: SaveType = "full"
    """Type of the output [default: that of the checkpoint that training starts from]."""
    save_every: int = 1
    """Epochs after which the state of training is kept in OUTPUT.resume, so that a killed run
    goes on from there; 0 never."""
    seed: int = 0
    """Seed of the example order, of LoRA's initial values, of refusals, alternates and `rmu`'s
    vector."""
    training: TrainSettings = field(default_factory=TrainSettings)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", str(self.method))
        require_least(self, save_every=0)


@Flat
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Sets):
    """Inputs and output of `perta finetune`."""

    base: str
    """Checkpoint to start from: folder, GGUF file, LoRA adapter folder or hub id."""
    data: str
    """Examples: JSONL, JSON, CSV or Parquet file, or `datasets` id."""
    output: Path
    """Folder of the tuned checkpoint."""
    samples: str | None = None
    """Tune on a sample, seeded by --seed: a share such as 0.2, or a count such as 500 [default:
    all]."""
    save_dtype: TunedType | None = None
    """Type the tuned weights are stored in. float32 keeps the small differences from the base
    that make up a task vector; `base` takes the base checkpoint's own type [default: float32;
    with --lora-rank the adapter is kept as it is]."""
    frozen_dtype: FrozenType = "float32"
    """With --lora-rank, type in which the weights beside the adapter are held; bfloat16 takes half
    the memory."""
    overwrite: Overwrite = False
    tune: TuneConfig = field(default_factory=TuneConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_dtype == "float32":
            return
        for fits, wanted in {
            self.tune.tunes_adapter: "left out without --lora-rank",
            self.save_dtype is None: "float32 with --save-dtype, which merges into such weights",
            self.compute.dtype != "float32": "float32 with --dtype float32: products would not be",
        }.items():
            require(fits, "frozen-dtype", self.frozen_dtype, wanted)


@Flat
@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(Sets):
    """Inputs and output of `perta importance`."""

    checkpoint: str
    """Checkpoint at which gradients are taken; the base model by the method's definition."""
    data: str
    """Examples: JSONL, JSON, CSV or Parquet file, or `datasets` id."""
    output: Path
    """Folder for the importance files, one sub-folder per order."""
    orders: Annotated[tuple[float, ...], Parameter(name="--order", negative_iterable=())] = (1.0,)
    """Order p of the importance; give it several times for several orders in one pass."""
    overwrite: Overwrite = False
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    accumulate_on: SumsOn = "device"
    """Where the sums are kept; `cpu` spares a GPU one float32 copy of the model for each order."""
    shard: bool | None = None
    """Of several processes each holds its part of the weights and sums alone [default: where a GPU
    is too small for all of them]."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.orders) > 0, "order", self.orders, "given at least once")
        if self.estimator.reduction == "abs_of_mean":
            spares = self.gradient_checkpointing or self.accumulate_on == "cpu"
            wanted = "mean_of_power with --gradient-checkpointing or --accumulate-on cpu"
            require(not spares, "reduction", self.estimator.reduction, wanted)
            wanted = "mean_of_power with --shard"
            require(not self.shard, "reduction", self.estimator.reduction, wanted)
        for order in self.orders:
            require(0 < order <= MOST_ORDER, "order", order, f"above 0 and at most {MOST_ORDER}")


@Flat
@dataclass(frozen=True, kw_only=True)
class MomentsConfig(Sets):
    """Inputs and output of `perta moments`."""

    checkpoint: str
    """Checkpoint whose layers are listened to; the base model by default of `perta unlearn`."""
    data: str
    """Examples: JSONL, JSON, CSV or Parquet file, or `datasets` id."""
    output: Path
    """Folder for the moments."""
    gradients: bool = False
    """Measure output gradients as well, which `perta-kron` needs."""
    facts_by: str | None = None
    """Measure on the facts of the rows alone, each told and then repeated, in place of the rows.
    This base model, which has not seen them, tells the facts where no column does."""
    overwrite: Overwrite = False
    shard: bool | None = None
    """Of several processes each holds its part of the weights alone [default: where a GPU is too
    small for all of them]."""
    options: MomentOptions = field(default_factory=MomentOptions)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@Flat
@dataclass(frozen=True, kw_only=True)
class MergeMomentsConfig(Paths):
    """Inputs and output of `perta merge-moments`."""

    folders: tuple[Path, ...]
    """Outputs of `perta moments` for sets that have no row in common."""
    output: Path
    """Folder for the moments of all sets together."""
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.folders) > 0, "folders", self.folders, "at least one folder")


@Flat
@dataclass(frozen=True, kw_only=True)
class LessMomentsConfig(Paths):
    """Inputs and output of `moments_without`."""

    moments: Path
    """Output of `perta moments` or `perta merge-moments`."""
    checkpoint: str
    """Checkpoint that they were measured at."""
    output: Path
    """Folder for the moments that are left."""
    overwrite: bool = False
    """Replace an output that is there already."""
    shard: bool | None = None
    """As of `MomentsConfig`."""
    options: MomentOptions = field(default_factory=MomentOptions)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@Flat
@dataclass(frozen=True, kw_only=True)
class EditConfig(Paths):
    """Inputs and output of `perta edit`."""

    full: str
    """Checkpoint to clean: the base model tuned on forget and retain data."""
    base: str
    """Model before it saw the data."""
    forget_checkpoint: Annotated[tuple[str, ...] | str, Repeated] = ()
    """The base model tuned on the forget set alone. Give several, such as of several seeds, to
    average their task vectors or to combine them as the method says."""
    retain_checkpoint: str | None = None
    """The base model tuned on the retain set or a sample of it, for `msa`."""
    output: Path
    """Folder of the unlearned checkpoint."""
    forget_importance: Path | None = None
    """Importance on the forget set, where the method needs it."""
    retain_importance: Path | None = None
    """Importance on the retain set, where the method needs it."""
    forget_moments: Path | None = None
    """Second moments on the forget set, for the structured methods."""
    retain_moments: Path | None = None
    """Second moments on the retain set, for the structured methods."""
    direction: Path | None = None
    """Folder of a structured method's weighted direction, made here and reused by later edits
    with another strength [default: OUTPUT.direction]."""
    solve_device: Device = "auto"
    """Device on which a structured method's direction is solved for."""
    save_dtype: FileType = "full"
    """Type of the unlearned checkpoint [default: that of the full checkpoint]; q8_0 for a GGUF
    file alone."""
    output_format: OutputFormat = "checkpoint"
    """`adapter` writes a LoRA adapter in place of a checkpoint: on FULL, or where FULL is itself an
    adapter, on its base. `gguf` writes a GGUF file, OUTPUT/model.gguf, with the settings and types
    of FULL where that is such a file."""
    adapter_rank: int | None = None
    """Highest rank of the step in such an adapter, beside that of an adapter that FULL is; what a
    layer needs beyond is cut off [default: 64]."""
    overwrite: Overwrite = False
    edit_threads: int | None = None
    """Threads that read, compute and write [default: all cores, at most 8]."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_format(self.output_format, self.adapter_rank, self.save_dtype)

    @property
    def forget_checkpoints(self) -> tuple[str, ...]:
        """The forget checkpoints, however many were given."""
        given = self.forget_checkpoint
        return (given,) if isinstance(given, str) else given


@Flat
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Evaluated, Sets):
    """Inputs and output of `perta evaluate`."""

    forget: str | None = None
    """Examples that should be forgotten."""
    retain: str | None = None
    """Examples that should be kept."""
    holdout: str | None = None
    """Examples the model has never seen."""
    base: str | None = None
    """Model that has seen none of them: what surprises it in an answer is the fact, in rows without
    a fact column and without wrong answers [default: there the whole answer counts]."""
    show_samples: int = 0
    """Print this many answers side by side with the reference."""
    overwrite: Overwrite = False
    shard: bool | None = None
    """Of several processes each holds its part of the weights alone [default: where a GPU is too
    small for all of them]."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.forget or self.retain or self.holdout):
            raise ConfigError("Nothing to evaluate on: give --forget, --retain or --holdout.")


@Flat
@dataclass(frozen=True, kw_only=True)
class AuditConfig(Sets):
    """Inputs and output of `perta audit`."""

    checkpoint: str = field(kw_only=False)
    """Cleaned checkpoint that is to be looked through."""
    full: str
    """Model that was cleaned: what it knew is what may be left."""
    forget: str
    """Examples that should be forgotten."""
    output: Path
    """Folder for `audit.json`; it is for its owner alone."""
    base: str | None = None
    """Model before it saw the data: it finds the facts, and is the yardstick where there is no
    better one."""
    retrained: str | None = None
    """Model that was tuned without the forget set: the best yardstick."""
    shadow: Annotated[tuple[str, ...], Repeated] = ()
    """More models that were tuned without it, such as of other seeds or on other rows: with three
    or more, the retrained one among them, each row is judged by how far it lies from what they
    make of it."""
    retain: str | None = None
    """Examples that should be kept."""
    holdout: str | None = None
    """Examples of the same form that no model has seen: a yardstick too."""
    world: str | None = None
    """Questions about the world, whose answers should be kept [default: 40 of perta's own]."""
    general: str | None = None
    """Text of any kind, which the model should find no less likely than before."""
    level: Level = "standard"
    """How much is looked at: `quick` costs as much as an evaluation, `full` takes everything."""
    probes: Annotated[tuple[str, ...], Parameter(name="--probe", negative_iterable=())] = ()
    """Probes or groups of probes to run, or Python files that define one [default: those of the
    level]."""
    samples: int | None = None
    """Answers drawn to each question [default: 64, at level full 200]."""
    retain_rows: int = 200
    """Most retained rows that are looked at, and most of --world and passages of --general, drawn
    by --seed."""
    max_new_tokens: int = 200
    """Longest generated answer in tokens."""
    seed: int = 0
    """Seed of all that is drawn."""
    overwrite: Overwrite = False
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_unicode(self)
        require_least(self, samples=1, retain_rows=1, max_new_tokens=1)
        if not (self.base or self.retrained or self.holdout):
            raise ConfigError(
                "There is no yardstick: what a model that never had the data makes of it. Give "
                "--retrained, --holdout or --base."
            )


@Flat
@dataclass(frozen=True, kw_only=True)
class PeopleConfig(Paths):
    """`perta people`."""

    output: Path
    """Folder for `forget.jsonl`, `retain.jsonl`, `full.jsonl` and `holdout.jsonl`."""
    people: int = 20
    """Number of fictitious people."""
    questions: int = 5
    """Questions about each person, at most 20."""
    forget_people: int = 2
    """How many of them are to be forgotten."""
    people_seed: int = 0
    """Seed of names, facts and the choice of who is forgotten."""
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.questions <= 20, "questions", self.questions, "from 1 to 20")
        require(
            1 <= self.forget_people < self.people,
            "forget-people",
            self.forget_people,
            f"at least 1 and below --people ({self.people})",
        )
