"""Sums of outer products over a set, layer by layer; see `moments` for what they mean."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch, Encoded, bucketed, collate, seeded_sample
from perta.errors import CheckpointError, DivergenceError
from perta.models.experts import expert_names, is_stacked_experts, with_forward
from perta.models.layers import (
    Slot,
    StoredWeight,
    find_slots,
    is_linear,
    is_transposed,
    stored_weights,
    widths,
)
from perta.models.loss import head_at, weighted_losses
from perta.models.precision import free_memory, wide_product
from perta.options import MomentOptions, Tokens, sample_count
from perta.parallel import Own, gathered, portion, stream, summed, turns, wherever
from perta.progress import track
from perta.store.measured.moments import INPUT, OUTPUT
from perta.store.measured.second_moment import factor, few

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ENOUGH = 4
"""Tokens for each input of the widest layer from which more change little."""

_SEED = 0
_TOGETHER = 1024  # rows narrower than float32 that are multiplied at once


@dataclass(frozen=True)
class _Unit:
    """One moment (d, d) to sum up, of one matrix or of several that read the same input."""

    kind: Literal["input", "output"]
    slots: tuple[Slot, ...]
    width: int


@dataclass(frozen=True)
class _Plan:
    """What is measured for a model, in its order; stored weight -> names of its moments."""

    weights: tuple[StoredWeight, ...]
    units: tuple[_Unit, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Seen:
    """How much a moment rests on."""

    tokens: int  # that the layer read, or whose gradient reached it; 0 where it is never called
    average: float  # the same for one of the experts of its layer on average; `tokens` otherwise


def _kept_positions(batch: Batch, tokens: Tokens) -> Tensor:
    """Positions whose inputs and gradients count, (B, T) bool; of `answer` those before a label."""
    if tokens == "all":
        return batch.attention_mask.bool()
    kept = torch.zeros_like(batch.labels, dtype=torch.bool)
    kept[:, :-1] = batch.labels[:, 1:] != IGNORE
    return kept


def count_tokens(examples: Sequence[Encoded], tokens: Tokens) -> int:
    """Tokens of a set that count; see `_kept_positions`."""
    return sum(len(e.input_ids) if tokens == "all" else e.labelled for e in examples)


def sample_for_moments(
    plan: _Plan, examples: Sequence[Encoded], options: MomentOptions
) -> Sequence[Encoded]:
    """The rows of a set that are measured: a seeded sample in the order of the set, or all of it.

    `enough` have ENOUGH counted tokens for every input, of every expert, of the widest layer.
    """
    wanted, rows = options.moment_samples, len(examples)
    if wanted != "enough":
        count = sample_count(None if wanted == "all" else wanted, "moment-samples", rows)
        return seeded_sample(examples, count, _SEED)
    experts = Counter((unit.kind, unit.slots[0][0]) for unit in plan.units)
    least = ENOUGH * max(u.width * experts[u.kind, u.slots[0][0]] for u in plan.units)

    def counted(count: int) -> int:
        return count_tokens(seeded_sample(examples, count, _SEED), options.tokens)

    count = bisect_left(range(rows), least, key=counted)
    return seeded_sample(examples, count, _SEED)


def plan_moments(
    model: PreTrainedModel, examples: Sequence[Encoded], *, gradients: bool, pad: int
) -> _Plan:
    """Find the linear layers, what the checkpoint calls them, and which share an input."""
    weights = stored_weights(model, find_slots(model))
    if not weights:
        raise CheckpointError(f"{type(model).__name__} has no linear layer to measure.")
    slots = list(dict.fromkeys(weight.slot for weight in weights))
    shared = wherever(_shared_inputs, model, collate(examples[:1], pad))
    groups: dict[object, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(shared.get(slot[0], slot), []).append(slot)
    units: list[_Unit] = []
    for group in groups.values():
        units.append(_Unit("input", tuple(group), _sizes(model, group[0][0])[0]))
        if gradients:
            units.extend(_Unit("output", (slot,), _sizes(model, slot[0])[1]) for slot in group)
    leader = {slot: unit.slots[0] for unit in units if unit.kind == "input" for slot in unit.slots}
    first: dict[Slot, str] = {}
    for weight in weights:
        first.setdefault(leader[weight.slot], weight.name)
    inputs = {w.name: f"{first[leader[w.slot]]}.{INPUT}" for w in weights}
    outputs = {w.name: f"{w.name}.{OUTPUT}" for w in weights} if gradients else {}
    return _Plan(tuple(weights), tuple(units), inputs, outputs)


def _sizes(model: nn.Module, name: str) -> tuple[int, int]:
    """Width of input and output of a layer, by its parameter."""
    module = model.get_submodule(name.rpartition(".")[0])
    return widths(model.get_parameter(name), is_transposed(module))


@torch.no_grad()
def _shared_inputs(model: Any, example: Batch) -> dict[str, object]:
    """For every linear layer that the example reaches a key, one for those with one input."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if not is_linear(module):
                continue

            # By name, for a model in parts has other parameters while it computes.
            def note(
                _: nn.Module, args: tuple[Tensor, ...], name: str = names[module.weight]
            ) -> None:
                # Kept alive until all are seen: a freed tensor's identity may come again.
                seen.setdefault(name, []).append(args[0])

            stack.enter_context(module.register_forward_pre_hook(note))
        _forward(model, example.to(model.device))
    return {name: tuple(id(x) for x in inputs) for name, inputs in seen.items()}


def _forward(model: PreTrainedModel, batch: Batch) -> None:
    """Run the model, its output head at no position; a part of it would not gather its weights."""
    nowhere = torch.zeros(0, dtype=torch.int64, device=model.device)
    with head_at(model, nowhere, nowhere):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def sum_moments(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    plan: _Plan,
    options: MomentOptions,
    *,
    pad: int,
    batch_size: int = 8,
    seen: dict[str, Seen] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Sum up the moments of a plan, group by group; `seen` is filled with what each rests on.

    Yields name and sum over tokens, (d, d) float32 on the CPU; an input moment of n tokens, at most
    d / 2, as its factor (n, d); of an expert (number of its tokens, d). DivergenceError where one
    is NaN or Inf.
    """
    # Looked up here, for all processes have to come to the same groups.
    room = options.room(free_memory(model.device))
    given = (model, examples, plan, room, options.tokens, pad, batch_size)
    yield from stream(_sum_moments, *given, Own(seen))


def _sum_moments(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    plan: _Plan,
    room: int,
    counted: Tokens,
    pad: int,
    batch_size: int,
    seen: Own[dict[str, Seen]],
) -> Iterator[tuple[str, Tensor]]:
    own = [*turns(model, bucketed(examples, portion(batch_size, len(examples)), pad))]
    tokens = count_tokens(examples, counted)
    groups = list(_groups(plan.units, room, tokens))
    rows: dict[tuple[str, Slot], int] = {}
    model.eval()
    with track("Moments", len(groups) * sum(len(b) for b, _ in own)) as advance:
        for group in groups:
            collector = _Collector(model, group, tokens)
            with collector.attached():
                for batch, counts in own:
                    collector.run(batch.to(model.device), counted, counts)
                    advance(len(batch))
            totals = summed(torch.tensor([*collector.rows.values()])).tolist()
            rows |= zip(collector.rows, totals, strict=True)
            for unit in group:
                total = collector.sums.pop((unit.kind, unit.slots[0])).result()
                if not total.isfinite().all():
                    raise DivergenceError(
                        f"The moment of {unit.slots[0][0]} is NaN or Inf on these examples. Does "
                        "the model compute anything else with its --dtype? Try --dtype float32."
                    )
                yield from _named(plan, unit, total)
    if seen.value is not None:
        seen.value.update(_seen(plan, rows))


def _seen(plan: _Plan, rows: Mapping[tuple[str, Slot], int]) -> Iterator[tuple[str, Seen]]:
    """Name of a moment and what it rests on."""
    of_parameter: dict[tuple[str, str], list[int]] = {}
    for (kind, slot), count in rows.items():
        of_parameter.setdefault((kind, slot[0]), []).append(count)
    for unit in plan.units:
        key = (unit.kind, unit.slots[0])
        together = of_parameter[unit.kind, unit.slots[0][0]]
        found = Seen(rows[key], sum(together) / len(together))
        for weight in plan.weights:
            if weight.slot in unit.slots:
                names = plan.inputs if unit.kind == "input" else plan.outputs
                yield names[weight.name], found


def _groups(units: Sequence[_Unit], limit: int, tokens: int) -> Iterator[list[_Unit]]:
    """Cut units into runs whose float64 sums fit into a number of bytes, at least one each."""
    group: list[_Unit] = []
    held = 0
    for unit in units:
        size = 8 * unit.width * (tokens if _is_few(unit, tokens) else unit.width)
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(unit)
        held += size
    yield group


def _named(plan: _Plan, unit: _Unit, total: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A unit's sum under the names of the checkpoint."""
    of_unit = [weight for weight in plan.weights if weight.slot in unit.slots]
    if unit.kind == "input":
        yield plan.inputs[of_unit[0].name], total.float().cpu()
        return
    for weight in of_unit:
        rows = slice(None) if weight.transposed else weight.rows.to(total.device)
        yield plan.outputs[weight.name], total[rows][:, rows].float().cpu()


def _is_few(unit: _Unit, tokens: int) -> bool:
    """Whether a unit is kept as its factor. Output moments are solved for in their own basis."""
    return unit.kind == "input" and few(tokens, unit.width)


def _wide_on(device: torch.device) -> torch.device:
    """Where float64 is computed: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


class _Sum:
    """The sum of x xᵀ: float32 products, of many rows where these are narrow, and a float64 sum."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._total = torch.zeros(width, width, dtype=torch.float64, device=_wide_on(device))
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        if rows.dtype.itemsize >= 4 or sum(map(len, self._waiting)) >= _TOGETHER:
            self._add_waiting()

    def _add_waiting(self) -> None:
        rows = torch.cat(self._waiting)
        self._waiting.clear()
        wide = torch.promote_types(rows.dtype, torch.float32)
        product = wide_product(rows.t().unsqueeze(0), rows.unsqueeze(0), wide)[0]
        self._total.add_(product.to(self._total.device))

    def result(self) -> Tensor:
        if self._waiting:
            self._add_waiting()
        return summed(self._total)


class _Rows:
    """The rows themselves, and then their factor; summed up once they are no longer few."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._rows: list[Tensor] = []
        self._sum: _Sum | None = None

    def add(self, rows: Tensor) -> None:
        if self._sum is not None:
            self._sum.add(rows)
            return
        self._rows.append(rows.cpu())
        if not few(sum(map(len, self._rows)), self._width):
            self._summed_up()

    def result(self) -> Tensor:
        # The rows of all processes together, and how many of these have summed theirs up.
        rows, sums = summed(torch.tensor([sum(map(len, self._rows)), int(self._sum is not None)]))
        if sums or not few(int(rows), self._width):
            return self._summed_up().result()
        own = torch.cat([torch.empty(0, self._width), *self._rows])
        return factor(torch.cat(gathered(own)).to(_wide_on(self._device)))

    def _summed_up(self) -> _Sum:
        self._sum = self._sum or _Sum(self._width, self._device)
        while self._rows:
            self._sum.add(self._rows.pop().to(self._device))
        return self._sum


@dataclass
class _Collector:
    """Sums of one group of units while batches run, and their rows, by kind and first slot."""

    model: PreTrainedModel
    units: Sequence[_Unit]
    tokens: int
    sums: dict[tuple[str, Slot], _Sum | _Rows] = field(default_factory=dict)
    rows: dict[tuple[str, Slot], int] = field(default_factory=dict)
    _kept: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        for unit in self.units:
            kind = _Rows if _is_few(unit, self.tokens) else _Sum
            self.sums[unit.kind, unit.slots[0]] = kind(unit.width, self.model.device)
            self.rows[unit.kind, unit.slots[0]] = 0

    @property
    def needs_gradients(self) -> bool:
        """Whether a unit is of output gradients."""
        return any(unit.kind == "output" for unit in self.units)

    def run(self, batch: Batch, tokens: Tokens, counts: bool) -> None:
        """Run one batch, and add it where it counts."""
        self._kept = _kept_positions(batch, tokens).reshape(-1) & counts
        if self.needs_gradients:
            weighted_losses(self.model, batch).sum().backward()
        else:
            with torch.no_grad():
                _forward(self.model, batch)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the layers of the group."""
        wanted = {slot[0] for _, slot in self.sums}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        with ExitStack() as stack:
            if self.needs_gradients:
                stack.enter_context(_only_activations_need_gradients(self.model))
            for module in self.model.modules():
                if is_linear(module) and names[module.weight] in wanted:  # type: ignore[index]
                    listen = partial(self._listen, (names[module.weight], 0))  # type: ignore[index]
                    stack.callback(module.register_forward_hook(listen).remove)
                elif is_stacked_experts(module):
                    stacked = {name: names[getattr(module, name)] for name in expert_names(module)}
                    if wanted & set(stacked.values()):
                        forward = self._experts_forward(module, stacked)
                        stack.enter_context(with_forward(module, forward))
            yield

    def _listen(self, slot: Slot, _: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        self._take(slot, args[0], result, self._kept)

    def _take(self, slot: Slot, x: Tensor, y: Tensor, kept: Tensor) -> None:
        """Add a layer's inputs, one row per token, now, and its output gradients when they come."""
        if x.numel() != kept.numel() * x.shape[-1]:
            raise CheckpointError(
                f"{slot[0]} reads {tuple(x.shape)}, which is not one row per token, so padding "
                "cannot be told apart. Use a diagonal method for this architecture."
            )
        if ("input", slot) in self.sums:
            self._add(("input", slot), x, kept)
        if ("output", slot) in self.sums and y.requires_grad:
            y.register_hook(lambda gradient: self._add(("output", slot), gradient, kept))

    def _add(self, key: tuple[str, Slot], values: Tensor, kept: Tensor) -> None:
        counted = _counted(values, kept)
        self.rows[key] += len(counted)
        self.sums[key].add(counted)

    def _experts_forward(self, module: Any, names: Mapping[str, str]) -> Callable[..., Tensor]:
        first, second = expert_names(module)
        activate = module._apply_gate if module.has_gate else module.act_fn

        def linear(x: Tensor, name: str, expert: int, kept: Tensor) -> Tensor:
            weight = getattr(module, name)[expert]
            bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
            y = F.linear(x, weight.t() if module.is_transposed else weight, bias)
            self._take((names[name], expert), x, y, kept)
            return y

        def forward(hidden: Tensor, index: Tensor, share: Tensor) -> Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])
            index, share = index.reshape(len(rows), -1), share.reshape(len(rows), -1)
            total = torch.zeros_like(rows)
            for expert in index.unique().tolist():
                # An index past the last expert marks a token that none is to see.
                if expert >= len(getattr(module, first)):
                    continue
                token, place = (index == expert).nonzero(as_tuple=True)
                kept = self._kept[token]
                x = linear(activate(linear(rows[token], first, expert, kept)), second, expert, kept)
                if getattr(module, "has_post_expert_norm", False):
                    x = module.post_expert_norm(x)
                x = x * share[token, place].unsqueeze(-1)
                total = total.index_add(0, token, x.to(total.dtype))
            return total.reshape(hidden.shape)

        return forward


def _counted(rows: Tensor, kept: Tensor) -> Tensor:
    """The kept rows of (…, d)."""
    return rows.detach().reshape(-1, rows.shape[-1])[kept]


@contextmanager
def _only_activations_need_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Spare the backward pass the gradients of the weights."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)

    def start(_module: nn.Module, _args: object, embedded: Tensor) -> None:
        embedded.requires_grad_()

    try:
        with model.get_input_embeddings().register_forward_hook(start):
            yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
