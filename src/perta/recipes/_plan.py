"""What a run will take, before it: estimates from sizes of sets and models.

Operations are those of forward (2 P) and backward passes (4 P) over the tokens of each stage, P
parameters. Tokens are counted on a sample of the rows. Fine-tuning, rounds and the search count at
the most that they may take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from perta.data.examples import ExampleSet
from perta.data.tokens import encode_examples
from perta.engine.edit.plan import Target, is_of_a_layer
from perta.engine.moments import ENOUGH
from perta.methods.objectives import Training
from perta.methods.registry import get_method
from perta.models.load import load_tokenizer, longest_input
from perta.models.resolve import quantised_checkpoint
from perta.options import sample_count
from perta.recipes.request import rows_config
from perta.recipes.settings import UnlearnConfig
from perta.store.checkpoint import CheckpointIndex, open_index
from perta.store.costs import BACKWARD, FORWARD, Plan, Step, title_of

_SAMPLE = 64
"""Rows of a set whose tokens are counted."""
_STRENGTHS = 12
"""About how many strengths a search looks at."""
_FLOAT = 4
_TUNED = 4
"""Numbers a parameter that is tuned takes: itself, its gradient and two of AdamW."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a request with the method's defaults; retention is judged on the set `judged`."""

    config: UnlearnConfig
    training: Training | None
    full: Path
    base: Path
    targets: Sequence[Target]
    sets: Mapping[str, ExampleSet]

    def plan(self, asked: Mapping[str, bool], work_folder: Path) -> Plan:
        """The plan of a run: step -> whether its result is there already."""
        steps = tuple(
            Step(name, title_of(name), 0.0 if done else self.operations(name), done)
            for name, done in asked.items()
        )
        made = [name for name, done in asked.items() if not done]
        memory = max((self._memory(name) for name in made), default=0.0)
        disk = sum(map(self._disk, asked))
        output = self._stored_output()
        return Plan(steps, memory, disk, output, work_folder, self.config.output)

    def operations(self, name: str) -> float:
        """About how many operations a step takes."""
        if name == "direction":
            # A factorisation of every input's moment, and a solve for every output.
            return sum(n**3 + 2.0 * m * n**2 for m, n in self._edited_shapes)
        return 2.0 * self._parameters * self._passes(name)

    def _passes(self, name: str) -> float:
        """Forward passes over one token."""
        config, forget = self.config, self._tokens("forget")
        learning = float(FORWARD + BACKWARD)
        match name.partition("_"):
            case "merge", _, _:
                return 1.0  # adding and writing: no passes, and not nothing
            case "calibrate", _, _:
                return 3 * forget + 2 * self._tokens("holdout")
            case ("finetune", _, _) | ("retain", _, "finetune"):
                return learning * config.tune.epochs * forget
            case side, _, "importance":
                return learning * self._tokens(side)
            case side, _, "moments":
                gradients = get_method(config.weighting.method).needs.gradients
                return (learning if gradients else FORWARD) * self._measured(side)
            case "rounds", _, _:
                # Half of the rows each time, and a search.
                halves = sum(0.5**place for place in range(1, config.rounds or 1))
                searches = _STRENGTHS * (config.rounds or 1)
                return (learning * config.tune.epochs * halves + searches) * forget
            case "strength", _, _:
                return _STRENGTHS * (forget + min(self._tokens("retain"), 4 * forget))
            case "train", _, _:
                return self._training_passes()
            case "evaluate", _, which:
                return self._evaluation_passes(which)
            case _:
                return 1.0  # as little

    def _training_passes(self) -> float:
        method = self.training
        assert method is not None, "no other method trains"
        forget, retain = self._tokens("forget"), self._tokens("retain")
        beside = min(forget, retain) if method.retain else 0.0
        seen = forget + beside if method.sees_forget_set else retain
        return (FORWARD + BACKWARD) * (self.config.training.epochs or method.epochs) * seen

    def _evaluation_passes(self, which: str) -> float:
        scoring = self.config.scoring
        names = ["forget"] if which == "base" else ["forget", "judged", "holdout"]
        read = sum(map(self._tokens, names))
        if not scoring.generate or which == "base":
            return read
        rows = sum(len(self.sets[name]) for name in names if name in self.sets)
        # Answers end by themselves, as a rule at about their own length.
        return 2 * read + min(rows * scoring.max_new_tokens, read)

    def _memory(self, name: str) -> float:
        model = _FLOAT * float(self._parameters)
        edited = _FLOAT * float(sum(m * n for m, n in self._edited_shapes))
        is_adapter = self.config.tune.lora_rank > 0
        tuned = model * (1 if is_adapter else _TUNED)
        match name.partition("_"):
            case ("finetune", _, _) | ("retain", _, "finetune"):
                return tuned
            case "train", _, _:
                whole = self.config.training.lora_rank == 0
                return model * (1 + _TUNED if whole else 2)
            case "rounds", _, _:
                return 2 * model + max(tuned, 2 * edited)
            case "strength", _, _:
                return model + 2 * edited
            case _, _, "importance":
                return 3 * model
            case _, _, "moments":
                most = self.config.moments.moment_memory * 2**30
                return model + min(self._moment_bytes(math.inf), most)
            case _:
                return model

    def _disk(self, name: str) -> float:
        model = _FLOAT * float(self._parameters)
        match name.partition("_"):
            case ("finetune", _, _) | ("retain", _, "finetune") | ("rounds", _, _):
                return model
            case _, _, "importance":
                return model
            case "merge", _, _:
                return self._moment_bytes(math.inf)
            case side, _, "moments":
                return self._moment_bytes(self._measured(side))
            case "direction", _, _:
                return _FLOAT * float(sum(m * n for m, n in self._edited_shapes))
            case _:
                return 0.0

    def _measured(self, side: str) -> float:
        """Tokens of a set that moments are measured on."""
        wanted, tokens = self.config.moments.moment_samples, self._tokens(side)
        if side != "retain" or wanted in (None, "all"):
            return tokens
        if wanted == "enough":
            layers = filter(is_of_a_layer, self._index.tensors.values())
            return min(tokens, float(ENOUGH * max(max(entry.shape) for entry in layers)))
        rows = len(self.sets[side])
        return tokens * sample_count(wanted, "retain-samples", rows) / rows

    def _moment_bytes(self, tokens: float) -> float:
        """Moments of all linear layers, or what spans them where there are few tokens."""
        method = None if self.training else get_method(self.config.weighting.method)
        gradients = method is not None and method.needs.gradients
        widths: dict[tuple[str, str], int] = {}
        for entry in filter(is_of_a_layer, self._index.tensors.values()):
            block = entry.name.rpartition(".")[0].rpartition(".")[0]
            widths[block, f"in {entry.shape[-1]}"] = entry.shape[-1]  # layers that share an input
            if gradients:
                widths[entry.name, "out"] = entry.shape[0]
        return sum(_FLOAT * min(tokens, n) * float(n) for n in widths.values())

    def _stored_output(self) -> float:
        """Bytes of a checkpoint like θ_full, in the type or format that is asked for."""
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "q8_0": 34 / 32}
        wanted = sizes.get(self.config.save_dtype)
        if wanted:
            return float(wanted * self._parameters)
        stored = quantised_checkpoint(self.config.full) or self.full
        return float(sum(entry.nbytes for entry in open_index(stored).tensors.values()))

    def _tokens(self, name: str) -> float:
        """About how many tokens a set has, prompts included; 0 without it."""
        if name not in self._counted:
            self._counted[name] = self._count(name) if name in self.sets else 0.0
        return self._counted[name]

    def _count(self, name: str) -> float:
        examples = self.sets[name]
        every = math.ceil(len(examples) / _SAMPLE)
        some = ExampleSet(examples.source, examples.examples[::every], (), "")
        rows = rows_config(self.config, name)
        longest = longest_input(self.base)
        encoded = encode_examples(some, self._tokenizer, rows, longest=longest).encoded
        return sum(len(one.input_ids) for one in encoded) * len(examples) / len(some)

    @cached_property
    def _counted(self) -> dict[str, float]:
        return {}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def _index(self) -> CheckpointIndex:
        return open_index(self.full)

    @cached_property
    def _parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self._index.tensors.values())

    @cached_property
    def _edited_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that are edited."""
        return [
            (target.full.shape[0], target.full.shape[-1])
            for target in self.targets
            if target.sources and is_of_a_layer(target.full)
        ]
