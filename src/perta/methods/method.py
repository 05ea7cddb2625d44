"""What a method is: a class with its settings, what it needs and what it computes.

A subclass with a `name` is known by it at once. It needs no decorator: its annotated fields,
each made with `option`, are its settings, and its docstring is its summary.
See docs/tutorials/own-method.md for one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import marshal
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor

from perta.errors import ConfigError
from perta.store.own_code import code_of, is_ours

T = TypeVar("T")
Side = Literal["forget", "retain"]
SideMoments = Mapping[Side, Tensor]  # second moment on every set that is needed
_STEPS = {"forget - base": "(θ_f − θ₀)", "full - base": "(θ_full − θ₀)", "full": "θ_full"}
_NOTHING = torch.empty(0)
MOVED = (
    "Every edited weight was moved back along what learning the removed examples alone does to it, "
)


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Mean of the task vectors, in place of the first; of one, that one untouched."""
    total = vectors[0]
    for vector in vectors[1:]:
        total.add_(vector)
    return total.div_(len(vectors)) if len(vectors) > 1 else total


def block_seed(seed: int, name: str, start: int) -> int:
    """Seed in [0, 2^63) of one block of one tensor, by the user's and the block's place alone."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{start}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Direction:
    """A weighted direction, and how well the solve behind it was posed."""

    delta: Tensor  # Δ (out, in), float64, to be subtracted from θ_full after scaling by α
    # Condition number of the matrix solved with, from below: the largest over the smallest
    # eigenvalue, both by power iteration.
    condition: float
    # Damping used, relative to the mean diagonal; above the one asked for where that is below what
    # float32 moments resolve.
    damping: float


def option(*, default: T, help: str, within: str = "(-inf, inf)") -> T:  # noqa: A002
    """A setting of a method; the type of `default` is its own.

    `help` is a phrase that help, model card and tables show, `within` an interval such as `(0, 1]`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "within": within})


@dataclass(frozen=True)
class Needs:
    """What must be made before a method can work."""

    tuned: int = 1  # forget checkpoints, at least
    retain_checkpoint: bool = False  # whether θ_r is needed
    importance: tuple[Side, ...] = ()  # sets whose importance is used
    moments: tuple[Side, ...] = ()  # sets whose second moments are used
    gradients: bool = False  # whether moments of output gradients are used as well
    facts: bool = False  # whether the forget set's facts, repeated, are among what is retained
    order: float = 1.0  # order p of the importance, where the method has no setting `order`
    # How the importance must have been reduced; either way without it.
    reduction: Literal["mean_of_power", "abs_of_mean"] | None = None
    # Model at which importance and moments are measured where the user gives none.
    at: Literal["base", "full"] = "base"
    set_sizes: bool = False  # whether the number of examples in each set is used


@dataclass
class Block:
    """What a method may look at to weight one block of one tensor."""

    # Importance on the forget set, float32, non-negative and finite; empty where the method needs
    # none, as `retain` is.
    forget: Tensor = _NOTHING
    retain: Tensor = _NOTHING  # importance on the retain set, same shape
    # Seed, tensor name and first element, for methods that draw: see `block_seed`.
    place: tuple[int, str, int] = (0, "", 0)
    task_vector: Tensor = _NOTHING  # the direction, set when it is known and W is asked for
    # For methods that rank weights, the smallest score kept, one for each score.
    cuts: tuple[float, ...] = ()
    forget_share: float = 0.5  # share of the examples of both sets that belongs to the forget set


KNOWN: dict[str, type[Method]] = {}  # every method that was defined, by name; `registry` finds them


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
class Method:
    """A way to forget."""

    name: ClassVar[str]  # what users type
    summary: ClassVar[str]  # one line on what it does; the docstring says it
    # What was done, a sentence or two for people who have not heard of any method.
    done: ClassVar[str]
    # What it computes, with I_f and I_r the importance on the forget and the retain set.
    formula: ClassVar[str]
    source: ClassVar[str]  # where it comes from

    def __init_subclass__(cls) -> None:
        """Make the settings fields, and the method known."""
        if "name" in vars(cls) and "summary" not in vars(cls):
            _sum_up(cls)
        dataclass(frozen=True, kw_only=True)(cls)
        for item in dataclasses.fields(cast(Any, cls)):
            if "help" not in item.metadata:
                raise ConfigError(
                    f"The setting `{item.name}` of {cls.__name__} says nothing of itself. Make it "
                    'with `option(default=..., help="...")`.'
                )
        if "name" in vars(cls):
            missing = [part for part in _SAID if not hasattr(cls, part)]
            missing += [
                part
                for part in dir(cls)
                if getattr(getattr(cls, part, None), "__isabstractmethod__", False)
            ]
            if missing:
                raise ConfigError(
                    f"The method `{cls.name}` lacks {', '.join(missing)}: write it into the class."
                )
            if (taken := KNOWN.get(cls.name)) and is_ours(taken):
                raise ConfigError(f"There is a method `{cls.name}` already; take another name.")
            KNOWN[cls.name] = cls

    def __post_init__(self) -> None:
        """Stop with a ConfigError at a setting of another type, or outside its interval."""
        for item in self.options():
            value: Any = getattr(self, item.name)
            within = item.metadata["within"]
            if isinstance(item.default, float) and type(value) is int:
                value = float(value)
                object.__setattr__(self, item.name, value)
            kind: type[Any] = type(item.default)
            is_number = kind in (int, float)
            if type(value) is not kind or (is_number and not _lies(float(value), within)):
                wanted = {int: "a whole number ", float: "a number "}.get(kind, "")
                wanted += f"in {within}" if is_number else f"like {item.default!r}"
                raise ConfigError(f"`{self.name}`: {item.name} is {value}; it must be {wanted}.")

    @classmethod
    def options(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Its settings, with `help` and `within` in their metadata."""
        return dataclasses.fields(cast(Any, cls))

    @property
    def settings(self) -> dict[str, Any]:
        """Name -> value of every setting."""
        return {item.name: getattr(self, item.name) for item in self.options()}

    def __str__(self) -> str:
        """How it is typed: `NAME:key=value,...`, defaults left out."""
        own = [
            f"{item.name}={value!r}"
            for item in self.options()
            if (value := getattr(self, item.name)) != item.default
        ]
        return ":".join([self.name, *([",".join(own)] if own else [])])

    @property
    def code(self) -> dict[str, Any]:
        """Hashes of its code, for an output's record, as far as it does not come with perta."""
        theirs = [cls for cls in type(self).__mro__ if not is_ours(cls) and cls is not object]
        return {"method_code": [_digest(cls) for cls in theirs]} if theirs else {}

    def record(self) -> dict[str, Any]:
        """What decides its result, for an output's record: name, settings, code not of perta."""
        return {"method": self.name, "method_settings": self.settings, **self.code}

    @property
    def equation(self) -> str:
        """What it does as an equation."""
        return self.formula


_SAID = ("summary", "done", "formula", "source")


class Edit(Method):
    """A method that edits weights: θ_u = θ_full − α · W ⊙ direction [+ β · (θ_r − θ₀)]."""

    needs: ClassVar[Needs] = Needs()  # what must be made before
    # What is weighted and subtracted: a task vector, or something of θ_full itself.
    direction: ClassVar[Literal["forget - base", "full - base", "full"]] = "forget - base"
    strength: ClassVar[float] = 1.0  # α where the user gives none
    # Layers that are edited where the user gives none.
    layers: ClassVar[Literal["mlp", "all"]] = "all"
    # Whether `perta unlearn` searches for the strength where the user gives none and there are
    # examples to keep.
    searched: ClassVar[bool] = False
    # Whether the largest of something over all weights are kept: see `scores`.
    ranks: ClassVar[bool] = False
    draws: ClassVar[bool] = False  # whether random numbers decide
    keep = 1.0  # share of the weights to keep, of a method that ranks
    retain_coef = 0.0  # β at the method's own strength or the one configured

    @property
    def order(self) -> float:
        """Order p of the importance."""
        return self.needs.order

    @property
    def weighs_retain(self) -> bool:
        """Whether importance on the retain set protects a weight."""
        return "retain" in self.needs.importance

    def combine(self, vectors: Sequence[Tensor], block: Block) -> Tensor:
        """Task vectors -> the direction; it may overwrite them."""
        del block
        return mean(vectors)

    def scores(self, vectors: Sequence[Tensor], block: Block) -> Sequence[Tensor]:
        """What is ranked, non-negative, one tensor for each ranking."""
        raise NotImplementedError

    def weigh(self, block: Block) -> Tensor | float:
        """W of a block's shape, or one number for all of it."""
        del block
        return 1.0

    def check_share(self, share: float) -> None:
        """Stop where the method can do nothing at this share of examples to forget."""
        del share

    def check_place(self, at: str | None) -> None:
        """Stop with a ConfigError at importance at the base where the full checkpoint is meant."""
        if self.needs.importance and self.needs.at == "full" and at == "base":
            raise ConfigError(
                f"`{self.name}` is defined on importance at the full checkpoint; leave the place "
                "to the method."
            )

    def scaled(self, factor: float) -> Self:
        """The method where α is multiplied: what keeps its proportion to α follows."""
        del factor
        return self

    @property
    def equation(self) -> str:
        """The edit as an equation."""
        step = "Δ" if self.needs.moments else f"W ⊙ {_STEPS[self.direction]}"
        added = " + β · (θ_r − θ₀)" if self.needs.retain_checkpoint else ""
        return f"θ_u = θ_full − α · {step}{added}"


class Weighting(Edit):
    """A method that says of every weight what share of it belongs to forgetting: `weigh`."""

    @abstractmethod
    def weigh(self, block: Block) -> Tensor | float:
        """W of a block's shape, or one number for all of it."""


class Combination(Edit):
    """A method that makes one direction of several task vectors: `combine`."""


class Directions(Edit):
    """A method that solves for the direction of every linear layer: `solve`."""

    # Whether Δ = τ R, where R does not depend on τ: then `solve` gets factors of τ in its place.
    by_rows: ClassVar[bool] = False

    @abstractmethod
    def solve(
        self, vectors: Sequence[Tensor], inputs: SideMoments, outputs: Callable[[int], SideMoments]
    ) -> Iterable[Direction]:
        """Directions of layers that read the same input, one each.

        `vectors` are their τ, (out, in) float64; with `by_rows` they may be A, (r, in), of τ = B A,
        and what is found is that of A. `inputs` has the input's second moment on every set needed,
        and `outputs` gives those of the output gradients by a layer's place.
        """


def _sum_up(cls: type[Method]) -> None:
    """Take the summary of a method from its docstring; from its formula where `-OO` left it out."""
    if doc := vars(cls).get("__doc__"):
        first = " ".join(doc.partition("\n\n")[0].split()).removesuffix(".")
        cls.summary = first[:1].lower() + first[1:]
    elif sys.flags.optimize > 1:
        cls.summary = cls.formula


def _lies(value: float, within: str) -> bool:
    low, high = map(float, within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    return above and (value <= high if within[-1] == "]" else value < high)


def _digest(cls: type[Any]) -> str:
    """Hash of the code of a class: of its file, or where it has none of its functions."""
    codes: list[CodeType] = [f.__code__ for f in vars(cls).values() if isinstance(f, FunctionType)]
    return code_of(cls) or hashlib.sha256(b"".join(map(marshal.dumps, codes))).hexdigest()
