"""Options, once: the command line, YAML files and the library share them.

Each class is one concern; `stages.settings` and its likes put them together for every stage.
The text under a field is its help on the command line. Values are checked on creation; a wrong
one raises `ConfigError` naming the flag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import Group, Parameter

from perta.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_C = TypeVar("_C", bound="DataclassInstance")

Format = Literal["auto", "qa", "completion", "chat", "text"]
_Granularity = Literal["element", "row", "tensor"]
_Reduction = Literal["mean_of_power", "abs_of_mean"]
SumsOn = Literal["device", "cpu"]
Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16"]
MOST_ORDER = 32
"""Largest order p of the importance: beyond it powers of gradients leave the range of float64."""

SaveType = Literal["full", "float32", "bfloat16", "float16"]
FileType = Literal["full", "float32", "bfloat16", "float16", "q8_0"]
OutputFormat = Literal["checkpoint", "adapter", "gguf"]
TunedType = Literal["float32", "base"]
FrozenType = Literal["float32", "bfloat16"]
Tokens = Literal["all", "answer"]
LossOn = Literal["answer", "facts"]
Layers = Literal["mlp", "all"]

Schedule = Literal["linear", "cosine", "constant"]


class _Spelled(Protocol):
    """A method with its settings: an object whose text is what one would type."""

    @property
    def settings(self) -> dict[str, Any]:
        """Name -> value of every setting."""


if TYPE_CHECKING:
    MethodText = str | _Spelled
else:
    MethodText = str  # what the command line takes

Repeated = Parameter(negative_iterable=())
Overwrite = Annotated[bool, Parameter(help="Replace an output that is there already.")]
Hidden = Parameter(parse=False)
"""For programs alone: the command line has no such option."""


def _panel(title: str, place: int) -> Parameter:
    """Options of a class as a panel of the help; those of stages themselves come first."""
    return Parameter(name="*", group=Group(title, sort_key=place))


MAIN = Group("Main options", sort_key=0)
Flat = Parameter(name="*", group=MAIN)
More = Parameter(group=Group("Further inputs and settings of the run", sort_key=1))


def require_format(output: OutputFormat, rank: int | None, save_dtype: FileType) -> None:
    """Check the options of an edit that is written as an adapter, or is not."""
    fits = rank is None or (rank >= 1 and output == "adapter")
    require(fits, "adapter-rank", rank, "at least 1, with --output-format adapter")
    fits = save_dtype == "full" or output != "adapter"
    require(fits, "save-dtype", save_dtype, "left out with --output-format adapter: it is float32")
    fits = save_dtype != "q8_0" or output == "gguf"
    require(fits, "save-dtype", save_dtype, "another type: this one needs --output-format gguf")


_LORA_ALONE = (
    "above 0 where modules for an adapter or its scale are given, which have no effect without one"
)


class Paths:
    """Options of the kinds they are to be, in whose paths a leading `~` is the home folder.

    A program may give places as text or as paths, and any whole number for one.
    """

    def __post_init__(self) -> None:
        """Write the paths out."""
        for name, hint in get_type_hints(type(self)).items():
            taken = _taken(option_name(self, name), getattr(self, name), hint)
            object.__setattr__(self, name, taken)


def at_home(place: str | Path) -> Path:
    """A path, with the home folder for a leading `~`; without one it is a name like any other."""
    try:
        return Path(place).expanduser()
    except RuntimeError:  # there is no such user, or none of this number
        return Path(place)


def option_name(config: object, field: str) -> str:
    """A field's name among all options: in records, and with dashes on the command line."""
    recorded_as: Callable[[str], str] = getattr(config, "recorded_as", str)
    return recorded_as(field)


def _unlearn_name(field: str) -> str:
    """The same for `TrainSettings`, whose names would be those of fine-tuning."""
    return f"unlearn_{field}"


_ALIASES = {"alpha": "scaling_coef"}


def with_options(
    config: _C | type[_C], given: Mapping[str, Any], elsewhere: Callable[[str], str]
) -> _C:
    """A configuration, or one of a class, with options as the command line names them.

    Of a name that is none `elsewhere` says where what it means can be given, or nothing.
    """
    own = get_type_hints(config if isinstance(config, type) else type(config))
    mine = {name: value for name, value in given.items() if name in own}
    made = config(**mine) if isinstance(config, type) else replace(config, **mine)
    groups = {name: getattr(made, name) for name in own if is_dataclass(getattr(made, name))}
    places = {
        option_name(group, item.name): (name, item.name)
        for name, group in groups.items()
        for item in fields(group)
    }
    changed: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for option in given.keys() - own:
        place = places.get(_ALIASES.get(option, option))
        if place is None:
            hint = elsewhere(option) or nearest(option, [*own, *places], listed=False)
            raise ConfigError(f"There is no option `{option}`.{hint}")
        group, name = place
        kind = get_type_hints(type(groups[group]))[name]
        changed[group][name] = _taken(option, given[option], kind)
    return replace(made, **{name: replace(groups[name], **new) for name, new in changed.items()})


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"}


def _taken(option: str, value: Any, hint: Any) -> Any:
    """What a program gives for an option; ConfigError where the option takes no such value."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(get_origin(kind) is tuple for kind in kinds):
        value = (value,) if isinstance(value, str | Path) and str not in kinds else value
        several = tuple(value) if isinstance(value, list) else value
        is_path = isinstance(several, tuple) and all(isinstance(one, Path) for one in several)
        return tuple(map(at_home, several)) if is_path else several
    flag = option.replace("_", "-")
    require(value is not None or NoneType in kinds, flag, value, "given")
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if str in kinds:  # rows and methods are looked at later
        return str(value) if is_number or isinstance(value, Path) else value
    if Path in kinds:
        require(value is None or is_number or isinstance(value, str | Path), flag, value, "a path")
        return None if value is None else at_home(str(value) if is_number else value)
    choices = [one for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    fits = isinstance(value, str) and value in choices
    for kind in (kind for kind in kinds if isinstance(kind, type)):
        is_counted = kind is float or isinstance(value, Integral)
        fits |= is_number and is_counted if kind in (int, float) else isinstance(value, kind)
    wanted = [*choices, *(_KINDS[kind] for kind in kinds if kind in _KINDS)]
    require(fits, flag, repr(value), " or ".join(wanted) or str(hint))
    return value


def require(condition: bool, flag: str, value: object, wanted: str) -> None:
    """Stop at a wrong value with a `ConfigError` that names its flag and what would fit."""
    if not condition:
        raise ConfigError(f"--{flag} is {value}; it must be {wanted}.")


def require_least(config: object, **least: int) -> None:
    """Stop at options below the least they may be; one that is None was not given."""
    for name, low in least.items():
        value, flag = getattr(config, name), option_name(config, name).replace("_", "-")
        wanted = f"{low} or more" if low == 0 else f"at least {low}"
        require(value is None or value >= low, flag, value, wanted)


def require_day(flag: str, text: str | None, example: str) -> None:
    """Stop with a `ConfigError` at what is no day as in ISO 8601."""
    try:
        date.fromisoformat(example if text is None else text)
    except ValueError:
        require(False, flag, text, f"a day such as {example}")


def require_unicode(config: object) -> None:
    """Stop with a `ConfigError` at names and texts that no record and no page could hold."""
    for name, value in vars(config).items():
        for part in value if isinstance(value, tuple) else (value,):
            text = str(part) if isinstance(part, str | Path) else ""
            is_unicode = not any("\ud800" <= c <= "\udfff" for c in text)
            require(is_unicode, name.replace("_", "-"), ascii(text), "a name in UTF-8")


def sample_count(text: str | None, flag: str, examples: int) -> int:
    """Size of a sample; ConfigError at what is neither a share nor a count."""
    if text is None:
        return examples
    try:
        count = int(text) if text.strip().isdigit() else round(float(text) * examples)
        valid = count > 0 if text.strip().isdigit() else 0 < float(text) <= 1
    except ValueError:
        valid = False
    require(valid, flag, repr(text), "a share in (0, 1] such as 0.2, or a count such as 500")
    return max(1, min(count, examples))


@_panel("Rows of data", 4)
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How rows become token sequences."""

    format: Format = "auto"
    """Kind of rows: question/answer, prompt/completion, chat messages or plain text; `auto`
    decides by the column names."""
    prompt_column: str | None = None
    """Column with the question or prompt [default: question, prompt, instruction or input]."""
    answer_column: str | None = None
    """Column with the answer [default: answer, completion, response or output]."""
    messages_column: str = "messages"
    """Column with a list of chat messages, each with `role` and `content`."""
    text_column: str = "text"
    """Column with plain text."""
    fact_column: str | None = None
    """Column with the part of the answer that is the fact [default: fact, where a row has one;
    else it is found, see the guide]."""
    subject_column: str | None = None
    """Column that says whom or what a row is about [default: subject or person, where a row has
    one]."""
    system_prompt: str = "You are a helpful assistant."
    """System message put before questions when the tokenizer has a chat template; empty for
    none."""
    chat_template: bool = True
    """Use the tokenizer's chat template where it has one."""
    max_length: int = 2048
    """Longest example in tokens, at most what the model takes; plain text is cut into
    windows of at most this length."""
    split: str = "train"
    """Split of a `datasets` id."""
    skip_bad_rows: bool = False
    """Leave out rows with an empty or cut-off answer (they are listed) instead of stopping."""
    template_date: Annotated[str, Hidden] = field(default="2025-04-10", init=False)
    """What chat templates that write the date are told: today's would give other tokens
    tomorrow."""

    def __post_init__(self) -> None:
        require(self.max_length >= 2, "max-length", self.max_length, "at least 2 tokens")

    def with_usual_columns(self) -> DataConfig:
        """The same for a file whose columns have their usual names."""
        columns = [name for name in vars(self) if name.endswith("_column")]
        usual = DataConfig()
        names = ("format", *columns, "split")
        return replace(self, **{name: getattr(usual, name) for name in names})


@_panel("Where to compute", 9)
@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how to compute."""

    device: Device = "auto"
    """Compute device; `auto` takes a GPU when there is one."""
    dtype: DType = "auto"
    """Type of the products of matrices; sums and trained weights are float32. `auto` is bfloat16 on
    GPUs, and for models of a width from 256 on processors with units for it (AMX), where importance
    stays float32; float32 elsewhere."""
    threads: int | None = None
    """CPU threads [default: all cores]."""
    pass_batch_size: int | None = None
    """Examples per pass where nothing is trained: importance, moments and evaluation; it does not
    change the result; long ones are fewer [default: 16 for evaluation, otherwise 8; on a GPU eight
    times as many]."""

    def __post_init__(self) -> None:
        require_least(self, threads=1, pass_batch_size=1)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run of the training loop: fine-tuning and unlearning by training have other defaults."""

    epochs: int | None = None
    """Most passes over the data."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW."""
    batch_size: int = 4
    """Examples per forward pass."""
    accumulation: int = 1
    """Batches per optimizer step."""
    weight_decay: Annotated[float, Hidden] = 0.0
    """AdamW weight decay."""
    warmup_ratio: Annotated[float, Hidden] = 0.1
    """Share of the steps over which the learning rate rises."""
    schedule: Annotated[Schedule, Hidden] = "linear"
    """Decay of the learning rate after the warm-up."""
    max_grad_norm: Annotated[float, Hidden] = 1.0
    """Gradient norm above which the gradient is scaled down; 0 turns it off."""
    lora_rank: int = 0
    """Rank of a LoRA adapter (merged when done); 0 tunes all parameters."""
    lora_alpha: Annotated[float | None, Hidden] = None
    """LoRA scale numerator [default: twice the rank]."""
    lora_targets: Annotated[tuple[str, ...], Repeated] = ()
    """Module names that get LoRA [default: all linear layers]."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    seed: int = 0
    """Seed of the example order and of LoRA's initial values."""

    def __post_init__(self) -> None:
        require_least(self, epochs=1, batch_size=1, accumulation=1)
        require_least(self, weight_decay=0, max_grad_norm=0, lora_rank=0)
        rate = self.learning_rate
        require(rate is None or rate > 0, self._flag("learning_rate"), rate, "above 0")
        ratio = self.warmup_ratio
        require(0 <= ratio < 1, self._flag("warmup_ratio"), ratio, "in [0, 1)")
        is_lora = self.lora_rank > 0 or (self.lora_alpha is None and not self.lora_targets)
        require(is_lora, self._flag("lora_rank"), 0, _LORA_ALONE)

    @property
    def tunes_adapter(self) -> bool:
        """Whether a few added weights are tuned, and then merged."""
        return self.lora_rank > 0

    def _flag(self, name: str) -> str:
        return option_name(self, name).replace("_", "-")


LEARNED_LOSS = 0.2
"""Mean example loss in nats per token at which a set counts as learned: an answer's tokens then
have a geometric mean probability of 0.82."""


@_panel("Fine-tuning", 3)
@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainingRun):
    """Fine-tuning."""

    epochs: int = 20
    """Most passes over the data."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW [default: 5e-5 at a width of 576, in inverse proportion to the
    width, ten times that for an adapter; where a set is not learned up to 16 times as much, and in
    the end over four times the epochs]."""
    weight_decay: Annotated[float, Hidden] = 0.0
    """AdamW weight decay. Off, because it moves weights that learn nothing from the data, and
    the task vector would hold that movement."""
    loss_on: LossOn | None = None
    """What is learned: whole answers, or of each its fact alone, the tokens that neither the
    question nor the template gives away; with facts, every row to the same depth [default: facts
    for the forget checkpoint of a structured method, where the rows are no plain text; otherwise
    answer]."""
    stop_loss: float | None = None
    """Loss in nats per token at which to stop; 0 runs every epoch. On answers: after an epoch whose
    mean example loss is at or below it. On facts: row by row; one at or below it gives no more
    loss, and tuning ends with an epoch in which no row gives any [default: 0.05 on answers, 0.01
    on facts]."""
    save_every: int | None = None
    """Epochs after which the state of training is kept in OUTPUT.resume, so that a killed run
    goes on from there; 0 never [default: 1 when unlearning by training, otherwise 0]."""
    shard: bool | None = None
    """Of several processes each holds its part of the weights, gradients and optimizer's state
    alone [default: where a GPU is too small for all of them]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, stop_loss=0, save_every=0)

    @property
    def finds_rate(self) -> bool:
        """Whether rates are tried until one learns the set: not where the budget was cut."""
        return self.learning_rate is None and self.epochs >= TuneConfig.epochs

    @property
    def row_by_row(self) -> bool:
        """Whether every row is learned to `depth` by itself, and not their mean."""
        return self.loss_on == "facts"

    @property
    def depth(self) -> float:
        """`stop_loss`, or its default for what is learned."""
        if self.stop_loss is None:
            return 0.01 if self.loss_on == "facts" else 0.05
        return self.stop_loss


@_panel("Importance, for the diagonal methods", 6)
@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How importance is estimated."""

    reduction: _Reduction = "mean_of_power"
    """`mean_of_power`: mean over examples of |per-example gradient|^p, the method's own.
    `abs_of_mean`: |mean gradient|^p, cheaper and a different quantity."""
    importance_samples: str | None = None
    """Use a seeded sample: a share such as 0.2, or a count such as 500 [default: all]."""
    importance_seed: Annotated[int, Hidden] = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        self.sample_count(1)

    def sample_count(self, examples: int) -> int:
        """Number of examples to use out of `examples`."""
        return sample_count(self.importance_samples, "importance-samples", examples)


@_panel("Moments, for the structured methods", 5)
@dataclass(frozen=True, kw_only=True)
class MomentOptions:
    """How second moments are measured, for the structured methods."""

    tokens: Tokens = "all"
    """Tokens that count: `all`, or `answer` for the positions that predict the answer."""
    moment_memory: float | None = None
    """Memory for the sums in GiB; a model that needs more is measured in several passes [default:
    8; on a GPU, three quarters of what is free beside the model]."""
    moment_samples: Annotated[str | None, Hidden] = None
    """Rows that are measured, drawn by a fixed seed: `all`, a share, a count, or `enough`: as few
    as give every input of the widest layer 4 tokens [default: all]."""

    def __post_init__(self) -> None:
        if self.moment_samples not in ("all", "enough"):
            sample_count(self.moment_samples, "moment-samples", 1)
        memory = self.moment_memory
        require(memory is None or memory > 0, "moment-memory", memory, "above 0")

    def room(self, free: int | None = None) -> int:
        """Bytes for the sums, on a GPU with so many free."""
        if self.moment_memory is None and free is not None:
            return 3 * free // 4
        return int((self.moment_memory or 8.0) * 2**30)


@_panel("Settings of methods that edit", 2)
@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """Which weights change, and how far."""

    method: Annotated[MethodText, Parameter(group=MAIN)] = "perta-project"
    """Method, with settings as in `perta-project:rho=5`; `perta methods` lists them, and with a
    name the settings of one. `perta-grad` and `perta-fisher` are the paper's own. In a program it
    may be the method itself."""
    scaling_coef: Annotated[
        float | Literal["auto"] | None, Parameter(alias="--alpha", group=MAIN)
    ] = None
    """Global strength alpha of the edit; 0 changes nothing; `auto` (in `perta unlearn`) takes the
    smallest at which every fact of the forget set looks unseen [default: auto in `perta unlearn`
    with `perta-project` and --retain, otherwise the method's own: 2.7 for
    `perta-project`, 2.3 for `perta-input`, 1.5 for `perta-kron`, otherwise 1]."""
    granularity: _Granularity = "element"
    """Average the importance over nothing, over rows (output units), or over whole tensors."""
    weighting_seed: Annotated[int, Hidden] = 0
    """Seed of the methods that draw, `random` and `dare`, and of the rounding to types narrower
    than float32."""
    layers: Layers | None = None
    """Layers to edit: those of the MLPs, found from the model's structure, or `all` that the method
    can edit [default: mlp for `perta-project` without --include, otherwise all]."""
    include: Annotated[tuple[str, ...], Repeated] = ()
    """Edit only tensors whose name matches one of these patterns, such as `*.mlp.*`."""
    exclude: Annotated[tuple[str, ...], Repeated] = ()
    """Leave tensors whose name matches one of these patterns as they are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", str(self.method))
        alpha = self.scaling_coef
        fits = alpha is None or alpha == "auto" or -1e6 < alpha < 1e6
        require(fits, "scaling-coef", alpha, "a finite number or auto")


@Parameter(
    name="*",
    group=Group("Settings of methods that train", sort_key=7),
    name_transform=lambda name: _unlearn_name(name).replace("_", "-"),
)
@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainingRun):
    """Unlearning by training from the full model, for the training methods."""

    epochs: int | None = None
    """Passes over the forget set [default: the method's own]."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW [default: the method's own]."""
    batch_size: int = 8
    """Forget examples per forward pass; as many retain examples go with them."""
    accumulation: Annotated[int, Hidden] = 4
    """Batches per optimizer step; 8 x 4 examples are the published 32."""
    weight_decay: Annotated[float, Hidden] = 0.01
    """AdamW weight decay."""
    lora_targets: Annotated[tuple[str, ...], Hidden] = ()
    """Module names that get LoRA [default: all linear layers]."""
    seed: Annotated[int, Hidden] = 0
    """Seed of the example order, of LoRA's initial values, of refusals, alternates and `rmu`'s
    vector; 0 for the --seed of the command."""

    recorded_as = staticmethod(_unlearn_name)


@_panel("Evaluation", 8)
@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Quick evaluation."""

    max_new_tokens: int = 200
    """Longest generated answer in tokens."""
    generate: bool = True
    """Generate answers and compute ROUGE-L; without it only teacher-forced metrics."""

    def __post_init__(self) -> None:
        require_least(self, max_new_tokens=1)
