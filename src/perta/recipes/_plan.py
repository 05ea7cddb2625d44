"""What a run will take, before it: estimates from sizes of sets and models.

Operations are those of forward (2 P) and backward passes (4 P) over the tokens of each step, P
parameters. Tokens are counted on a sample of the rows. Fine-tuning, rounds and searches count at
the most that they may take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from perta.data.examples import ExampleSet
from perta.data.tokens import encode_examples
from perta.engine.edit.plan import BASE, FORGET, is_of_a_layer, plan_edit
from perta.engine.moments import ENOUGH
from perta.errors import CheckpointError
from perta.methods.method import Directions
from perta.methods.objectives import Training
from perta.methods.registry import get_method, with_defaults
from perta.models.load import load_tokenizer, longest_input
from perta.options import (
    DataConfig,
    MomentOptions,
    ScoringConfig,
    TrainingRun,
    TuneConfig,
    WeightingConfig,
    sample_count,
)
from perta.stages.stage import NotMadeError, Place, only_asking
from perta.store.checkpoint import CheckpointIndex, open_index
from perta.store.costs import BACKWARD, FORWARD, Plan, Step, title_of

_P = TypeVar("_P", bound=Place)

_SAMPLE = 64  # rows of a set whose tokens are counted
_STRENGTHS = 12  # about how many strengths a search looks at
_TAUGHT = 24  # epochs to tell what comes back: six of all rows, about four times
_FLOAT = 4
_TUNED = 4  # numbers a parameter that is tuned takes: itself, its gradient and two of AdamW
_LEARN = float(FORWARD + BACKWARD)


@dataclass(frozen=True)
class Load:
    """What a step takes."""

    # forward passes over one token; adding and writing has none, and is not nothing
    passes: float = 1.0
    memory: float = 0.0  # bytes of weights and sums beside one model
    disk: float = 0.0  # bytes of what it leaves
    operations: float = 0.0  # in place of passes


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, and of sets as `base` reads them, and what steps with them take."""

    model: Path
    base: Path
    data_config: DataConfig

    def small(self) -> Load:
        """A step that no token goes through."""
        return Load()

    def tuning(
        self, examples: ExampleSet, samples: str | None, tune: TuneConfig, *, merges: bool = False
    ) -> Load:
        """Fine-tuning on a set or a sample of it; `merges` an adapter."""
        rows = len(examples)
        share = sample_count(samples, "samples", rows) / rows
        passes = _LEARN * tune.epochs * share * self.tokens(examples)
        return Load(passes, self._tuned(tune), self.weights if merges else self._kept(tune))

    def importance(self, examples: ExampleSet, orders: int) -> Load:
        """Importance of some orders, in one pass."""
        return Load(_LEARN * self.tokens(examples), 2 * self.weights, orders * self.weights)

    def moments(self, examples: ExampleSet, gradients: bool, options: MomentOptions) -> Load:
        """Second moments."""
        wanted, tokens, rows = options.moment_samples, self.tokens(examples), len(examples)
        if wanted == "enough":
            layers = filter(is_of_a_layer, self._index.tensors.values())
            tokens = min(tokens, float(ENOUGH * max(max(entry.shape) for entry in layers)))
        elif wanted not in (None, "all"):
            tokens *= sample_count(wanted, "retain-samples", rows) / rows
        memory = min(self.merged(gradients).disk, options.room())
        passes = (_LEARN if gradients else FORWARD) * tokens
        return Load(passes, memory, self._moment_bytes(gradients, tokens))

    def merged(self, gradients: bool) -> Load:
        """Adding moments."""
        return Load(disk=self._moment_bytes(gradients, math.inf))

    def direction(self, weighting: WeightingConfig, rank: int = 0) -> Load:
        """A factorisation of every input's moment, and a solve for every output, or factor's row.

        `rank` is that of the task vectors, 0 where it is not known.
        """
        is_thin, edited = self._is_thin(weighting, rank), self._edited(weighting)
        operations = sum(n**3 + 2.0 * (rank if is_thin else m) * n**2 for m, n in edited)
        disk = _FLOAT * float(rank * sum(m + n for m, n in edited))
        return Load(0.0, 0.0, disk if is_thin else self._step(weighting), operations)

    def edit(self, weighting: WeightingConfig, *, disk: bool = True) -> Load:
        """An edit and the direction of a structured method; `disk`: both are written."""
        is_structured = get_method(weighting.method).needs.moments
        load = self.direction(with_defaults(weighting)) if is_structured else self.small()
        return replace(load, disk=disk * (load.disk + self.weights))

    def calibrate(self, forget: ExampleSet, holdout: ExampleSet | None) -> Load:
        """What unseen means."""
        return Load(3 * self.tokens(forget) + 2 * self.tokens(holdout))

    def given(self, forget: ExampleSet) -> Load:
        """What a given forget checkpoint and the base know of the forget set."""
        return Load(2 * self.tokens(forget))

    def rounds(
        self,
        forget: ExampleSet,
        count: int,
        tune: TuneConfig,
        weighting: WeightingConfig,
        rank: int,
    ) -> Load:
        """Rounds of tuning on all rows, half of them and so on, and on some, each with a search.

        `rank` is that of every task vector, 0 where one is whole.
        """
        shares = 1 + sum(0.5**place for place in range(count - 2))
        learned = tune.epochs * shares + _TAUGHT
        passes = (_LEARN * learned + _STRENGTHS * count) * self.tokens(forget)
        beside = max(self.weights + self._tuned(tune), self._search(weighting, rank))
        if rank:  # their ranks add up
            return Load(passes, beside, count * self._kept(tune))
        return Load(passes, self.weights + beside, self.weights)

    def strength(
        self, forget: ExampleSet, retain: ExampleSet, weighting: WeightingConfig, rank: int = 0
    ) -> Load:
        """The search for the strength; `rank` as of `direction`."""
        tokens = self.tokens(forget)
        passes = _STRENGTHS * (tokens + min(self.tokens(retain), 4 * tokens))
        return Load(passes, self._search(weighting, rank))

    def training(
        self, method: Training, run: TrainingRun, forget: ExampleSet, retain: ExampleSet | None
    ) -> Load:
        """Unlearning by training."""
        seen, kept = self.tokens(forget) * max(1, method.alternates), self.tokens(retain)
        seen = seen + (min(seen, kept) if method.retain else 0.0)
        passes = _LEARN * (run.epochs or method.epochs) * (seen if method.sees_forget_set else kept)
        return Load(passes, self.weights * (1 if run.tunes_adapter else _TUNED))

    def evaluation(self, scoring: ScoringConfig, sets: Iterable[ExampleSet]) -> Load:
        """The quick evaluation; answers end by themselves, as a rule at about their own length."""
        sets = list(sets)
        read, rows = sum(map(self.tokens, sets)), sum(map(len, sets))
        written = read + min(rows * scoring.max_new_tokens, read) if scoring.generate else 0.0
        return Load(read + written)

    def tokens(self, examples: ExampleSet | None) -> float:
        """About how many tokens a set has, prompts included; 0 without one."""
        if examples is None:
            return 0.0
        if examples.fingerprint not in self._counted:
            every = math.ceil(len(examples) / _SAMPLE)
            some = ExampleSet(examples.source, examples.examples[::every], (), "")
            longest = longest_input(self.base)
            encoded = encode_examples(some, self._tokenizer, self.data_config, longest=longest)
            tokens = sum(len(one.input_ids) for one in encoded.encoded)
            self._counted[examples.fingerprint] = tokens * len(examples) / len(some)
        return self._counted[examples.fingerprint]

    def operations(self, load: Load) -> float:
        """Floating-point operations of a step."""
        return load.operations or 2.0 * self.parameters * load.passes

    @cached_property
    def parameters(self) -> int:
        """P."""
        return sum(math.prod(entry.shape) for entry in self._index.tensors.values())

    @property
    def weights(self) -> float:
        """Bytes of a float32 model."""
        return _FLOAT * float(self.parameters)

    @cached_property
    def _counted(self) -> dict[str, float]:
        return {}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def _index(self) -> CheckpointIndex:
        return open_index(self.model)

    def _tuned(self, tune: TuneConfig) -> float:
        """Bytes beside the model that is tuned."""
        return 0.0 if tune.lora_rank else (_TUNED - 1) * self.weights

    def _kept(self, tune: TuneConfig) -> float:
        """Bytes of a tuned model, or of an adapter of all linear layers."""
        layers = filter(is_of_a_layer, self._index.tensors.values())
        sides = sum(entry.shape[0] + entry.shape[-1] for entry in layers)
        return _FLOAT * float(tune.lora_rank * sides) if tune.lora_rank else self.weights

    def _is_thin(self, weighting: WeightingConfig, rank: int) -> bool:
        """Whether a direction keeps the factors of task vectors."""
        method = get_method(weighting.method)
        return rank > 0 and isinstance(method, Directions) and method.by_rows

    def _search(self, weighting: WeightingConfig, rank: int) -> float:
        """Bytes of the edited weights as they were, and of Δ."""
        return (1 if self._is_thin(weighting, rank) else 2) * self._step(weighting)

    def _edited(self, weighting: WeightingConfig) -> list[tuple[int, int]]:
        """Shapes of the matrices that are edited."""
        sources = {BASE: self._index, FORGET: self._index}
        return [
            (target.full.shape[0], target.full.shape[-1])
            for target in plan_edit(self._index, sources, weighting)
            if target.sources and is_of_a_layer(target.full)
        ]

    def _step(self, weighting: WeightingConfig) -> float:
        """Bytes of Δ."""
        return _FLOAT * float(sum(m * n for m, n in self._edited(weighting)))

    def _moment_bytes(self, gradients: bool, tokens: float) -> float:
        """Moments of all linear layers, or what spans them where there are few tokens."""
        widths: dict[tuple[str, str], int] = {}
        for entry in filter(is_of_a_layer, self._index.tensors.values()):
            block = entry.name.rpartition(".")[0].rpartition(".")[0]
            widths[block, f"in {entry.shape[-1]}"] = entry.shape[-1]  # layers that share an input
            if gradients:
                widths[entry.name, "out"] = entry.shape[0]
        return sum(_FLOAT * min(tokens, n) * float(n) for n in widths.values())


@dataclass
class Asked:
    """A run of which only the plan is asked for: its steps so far, and what they take."""

    sizes: Sizes
    looks: bool = True  # whether to look for what is there already
    part: str = ""  # added to the names of steps, in a run that has some of them several times
    _steps: list[Step] = field(default_factory=list)
    _memory: float = 0.0
    _disk: float = 0.0
    _places: dict[Path, Path] = field(default_factory=dict)

    def note(self, name: str, load: Load, *, reused: bool = False) -> None:
        """Add a step."""
        operations = 0.0 if reused else self.sizes.operations(load)
        self._steps.append(Step(name + self.part, title_of(name) + self.part, operations, reused))
        self._disk += load.disk
        if not reused:
            self._memory = max(self._memory, self.sizes.weights + load.memory)

    def look(
        self,
        name: str,
        run: Callable[[_P], object],
        config: _P,
        load: Callable[[Sizes], Load],
        *,
        looks: bool = True,
    ) -> Path:
        """Add a step once, and say where its output lies or will lie."""
        output = config.output
        if output not in self._places:
            reused = False
            # A stage that stands on one that is not there finds nothing to read.
            with only_asking() as found, suppress(NotMadeError, CheckpointError):
                if self.looks and looks:
                    run(config)
                    reused = True
            self.note(name, load(self.sizes), reused=reused)
            self._places[output] = found.get(output, output)
        return self._places[output]

    def plan(self, work: Path, output: Path, stored: float = 0.0) -> Plan:
        """The plan of the run; `stored` are the bytes of its output."""
        return Plan(tuple(self._steps), self._memory, self._disk, stored, work, output)
