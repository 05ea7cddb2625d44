"""Mean powers of per-example gradients, at about the cost of one training pass.

For every requested order p > 0

    I_p[name] = (1/N) sum_x |d loss(theta; x) / d theta|^p,

the mean over examples of a power of each example's own gradient. The power has to be taken
before the sum over the batch, so the gradient autograd hands out, already summed, is of no use.

How the engine works. While the model runs forward, every operation that reads a parameter
(linear maps, embeddings, norms, stacked experts) is replaced by one that computes the same
values, but whose backward step hands the layer's input and output gradient to a `Recorder`
instead of forming the gradient of the parameter. The recorder forms each example's gradient
in small blocks, adds its powers to running means and forgets it.

Nothing is taken on trust: autograd is asked for the gradients of all parameters all the same.
A parameter that was read only by replaced operations has none left. Any other still has one,
and is computed by the example loop instead, with a line in the log that says so. One that has
neither is not used by the model, or its gradient goes another way: a plain backward pass tells.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch
from perta.engine.gradients._capture import Capture, checkpointed_layers, replaced_modules
from perta.engine.gradients._parts import MeansInParts, own_rows, whole_parameters
from perta.engine.gradients._recorder import Recorder
from perta.engine.gradients.powers import Means, add_powers, power
from perta.errors import ConfigError, DataError, EmptyDatasetError, EngineMismatchError, some
from perta.models.loss import weighted_losses
from perta.parallel import count, is_part, summed, turns

_FLOAT32_ORDERS = 4.0  # largest order whose powers float32 holds: those of gradients down to 1e-11

_logger = logging.getLogger("perta")

Progress = Callable[[int], None]
"""Called after each batch with the number of examples that it finished on all processes."""


@dataclass(frozen=True)
class Moments:
    """Mean powers of gradients."""

    # Order -> parameter name -> tensor of the parameter's shape, >= 0; float32, and float64 for
    # orders above 4.
    by_order: dict[float, dict[str, Tensor]]
    examples: int  # number of examples the mean is over
    tokens: int  # number of labelled tokens in them
    # Names of the parameters that took the slow path, in the model's order.
    fallback: tuple[str, ...] = ()


# --- the reference and the cheap relative ---------------------------------------------------


def example_loop_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    orders: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Mean powers of per-example gradients, one example at a time through autograd; see the engine.

    A copy of the model is cast to `dtype`, in which powers are summed up too; by default its own,
    and float32.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    if dtype is not None:
        model = _cast_copy(model, dtype)
    means = _zero_means(_trained(model), orders, listed)
    with _inference_behaviour(model):
        _add_example_loop(model, listed, means, progress)
    return _moments(means, listed)


def abs_of_mean(
    model: nn.Module,
    batches: Iterable[Batch],
    orders: Sequence[float],
    *,
    progress: Progress | None = None,
) -> Moments:
    """Power of the magnitude of the mean gradient: |(1/N) sum_x d loss(x) / d theta|^p, float32.

    Gradients of different examples cancel here, so it is cheaper than the mean of powers, and a
    different quantity.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    parameters = _trained(model)
    sums = _zeros_like(parameters, wide=_is_wide(orders))
    silent = set(parameters)
    with _inference_behaviour(model):
        for batch, _ in _turns(model, listed, progress):
            loss = weighted_losses(model, batch.to(_device(model))).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, accumulated), gradient in zip(sums.items(), gradients, strict=True):
                if gradient is not None:
                    accumulated.add_(gradient)
                    silent.discard(name)
        _require_unused(model, listed, silent)
    examples = sum(map(len, listed))
    means = {name: summed(value) / examples for name, value in sums.items()}
    by_order = {
        order: {name: _kept(power(mean, order), order) for name, mean in means.items()}
        for order in orders
    }
    return Moments(by_order, examples, _count_tokens(listed))


# --- the engine -----------------------------------------------------------------------------


def batched_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    orders: Sequence[float],
    *,
    gradient_checkpointing: bool = False,
    accumulate_on: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Mean powers of per-example gradients, one forward and backward pass per batch.

    Equal to `example_loop_moments` up to rounding, whatever the batch size, the padding and the
    order of the rows. Several orders cost little more than one; sums on the "cpu" spare the
    accelerator one float32 copy of the model per order. ConfigError at an order that is not
    positive and finite, or a model without layers to checkpoint; DataError without examples, or at
    one without a labelled token; EngineMismatchError where the model has gradients that do not come
    by.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    whole = whole_parameters(model)
    parameters = _trained(model)
    means = _zero_means(parameters, orders, listed, accumulate_on)
    recorder = Recorder({name: whole[name] for name in parameters}, means, whole.get(_head(model)))
    with _inference_behaviour(model), ExitStack() as stack:
        stack.enter_context(replaced_modules(model, recorder))
        if gradient_checkpointing:
            stack.enter_context(checkpointed_layers(model, recorder))
        for batch, counts in _turns(model, listed, progress):
            _run_batch(model, batch, recorder, counts)
    _require_unused(model, listed, recorder.silent)
    dropped = _counted(parameters, parameters.keys() - recorder.names.values())
    slow = tuple(name for name, processes in dropped.items() if processes)
    _run_fallback(model, listed, means, slow)
    return _moments(means, listed, slow)


def _run_batch(model: nn.Module, batch: Batch, recorder: Recorder, counts: bool) -> None:
    """Add a batch that counts; drop parameters that autograd still had to differentiate."""
    handled = list(recorder.names)
    if not handled:
        return
    recorder.start(batch, counts)
    with Capture(recorder):
        loss = weighted_losses(model, batch.to(_device(model))).sum()
    recorder.counting = False
    if is_part(model):
        recorder.agree()
    gradients = torch.autograd.grad(loss, handled, allow_unused=True)
    recorder.finish()
    for parameter, gradient in zip(handled, gradients, strict=True):
        if gradient is not None:
            recorder.drop(parameter)


def _run_fallback(
    model: nn.Module, batches: Sequence[Batch], means: Mapping[str, Means], slow: Sequence[str]
) -> None:
    """Compute the named parameters with the example loop, replacing what is in their means."""
    if not slow:
        return
    _logger.warning(
        "importance example by example, which is slower, for what the batched engine has "
        "no rule for: %s",
        ", ".join(slow),
    )
    for name in slow:
        for mean in means[name].by_order.values():
            mean.zero_()
    with _inference_behaviour(model):
        _add_example_loop(model, batches, {name: means[name] for name in slow}, None)


def _add_example_loop(
    model: nn.Module,
    batches: Iterable[Batch],
    means: Mapping[str, Means],
    progress: Progress | None,
) -> None:
    """Add |gradient|^p of every example to the means of the named parameters."""
    batches = list(batches)
    examples = [example for batch in batches for example in _single_examples(batch)]
    parameters = [p for name, p in whole_parameters(model).items() if name in means]
    silent = set(means)
    for example, counts in _turns(model, examples, progress):
        loss = weighted_losses(model, example.to(_device(model))).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, own), gradient in zip(means.items(), gradients, strict=True):
            with own.adding(counts) as sums:
                if gradient is not None:
                    add_powers(sums, gradient.unsqueeze(0))
                    silent.discard(name)
    _require_unused(model, batches, silent)


def _require_unused(model: nn.Module, batches: Sequence[Batch], silent: Collection[str]) -> None:
    """Stop where a plain backward pass has a gradient of a parameter of which none was seen."""
    parameters = dict(model.named_parameters())
    silent = [n for n, processes in _counted(parameters, silent).items() if processes == count()]
    if not silent:
        return
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        example = next(_single_examples(batches[0].to(_device(model))))
        with _inference_behaviour(model):
            weighted_losses(model, example).sum().backward()
        lost = [n for n, p in parameters.items() if n in silent and p.grad is not None]
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
    if lost:
        raise EngineMismatchError(
            f"importance: no gradient of {some(lost)} was recorded, though the model has one. The "
            "importance would be zero, as if nothing there were to be kept. Measure the model as "
            "transformers loads it, not wrapped, replaced or divided by other code."
        )


def _turns(
    model: nn.Module, batches: Sequence[Batch], progress: Progress | None
) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, and whether they count; the others then have done about as many."""
    for k, turn in enumerate(turns(model, batches)):
        yield turn
        if progress is not None:
            progress(sum(map(len, batches[k * count() : (k + 1) * count()])))


def _counted(names: Iterable[str], true: Collection[str]) -> dict[str, int]:
    """Of how many processes something is true, for each parameter."""
    of_all = {name: int(name in true) for name in names}
    return dict(zip(of_all, summed(torch.tensor([*of_all.values()])).tolist(), strict=True))


def _single_examples(batch: Batch) -> Iterator[Batch]:
    """Cut a batch into its examples, without their padding."""
    for i in range(len(batch)):
        yield batch.rows(slice(i, i + 1))


# --- small helpers ----------------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _zero_means(
    parameters: Mapping[str, nn.Parameter],
    orders: Sequence[float],
    batches: Sequence[Batch],
    device: torch.device | str | None = None,
) -> dict[str, Means]:
    zeros = {order: _zeros_like(parameters, device, wide=_is_wide(orders)) for order in orders}
    weight = 1 / sum(len(batch) for batch in batches)

    means: dict[str, Means] = {}
    for name, parameter in parameters.items():
        own = {order: tensors[name] for order, tensors in zeros.items()}
        is_whole = own_rows(parameter) is parameter
        means[name] = Means(own, weight) if is_whole else MeansInParts(own, weight, parameter)
    return means


def _zeros_like(
    parameters: Mapping[str, nn.Parameter],
    device: torch.device | str | None = None,
    *,
    wide: bool = False,
) -> dict[str, Tensor]:
    """Zeros to accumulate in: float64 where wanted or for float64 parameters, else float32."""
    zeros: dict[str, Tensor] = {}
    groups: defaultdict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    own = {name: own_rows(parameter) for name, parameter in parameters.items()}
    for name, parameter in own.items():
        place = torch.device(device) if device is not None else parameter.device
        is_wide = wide or parameter.dtype == torch.float64
        groups[place, torch.float64 if is_wide else torch.float32].append(name)
    for (place, dtype), names in groups.items():
        sizes = [own[name].numel() for name in names]
        for name, flat in zip(names, _zeros(sum(sizes), dtype, place).split(sizes), strict=True):
            zeros[name] = flat.view(own[name].shape)
    return {name: zeros[name] for name in parameters}


def _is_wide(orders: Sequence[float]) -> bool:
    """Whether powers are kept in float64: in float32 the 8th power of 1e-6 is 0."""
    return max(orders) > _FLOAT32_ORDERS


def _kept(powers: Tensor, order: float) -> Tensor:
    """Powers in the type they are handed on in."""
    return powers.double() if _is_wide([order]) else powers.float()


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    # NumPy asks for huge pages and leaves clearing to the system: a third of the time.
    return torch.from_numpy(np.zeros(count, np.float64 if dtype == torch.float64 else np.float32))


def _moments(
    means: Mapping[str, Means], batches: Sequence[Batch], fallback: tuple[str, ...] = ()
) -> Moments:
    by_order: dict[float, dict[str, Tensor]] = {}
    for name, own in means.items():
        for order in own.by_order:
            by_order.setdefault(order, {})[name] = _kept(own.total(order), order)
    return Moments(by_order, sum(len(batch) for batch in batches), _count_tokens(batches), fallback)


def _checked_orders(orders: Sequence[float]) -> tuple[float, ...]:
    distinct = tuple(dict.fromkeys(float(order) for order in orders))
    for order in distinct:
        if not 0 < order < math.inf:
            raise ConfigError(f"importance order {order:g} is not a positive finite number")
    if not distinct:
        raise ConfigError("no importance order given; use 1, 2, or both")
    return distinct


def _checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """A list, because the fallback goes over the batches again, without empty examples."""
    listed = list(batches)
    if not any(len(batch) for batch in listed):
        raise EmptyDatasetError("importance needs at least one example")
    for batch in listed:
        labelled = (batch.labels[:, 1:] != IGNORE).any(1)
        if not labelled.all():
            place = int(batch.index[~labelled][0])
            raise DataError(
                f"example {place} (counted from 0) has no labelled token to predict, so it has "
                "no loss; leave it out, or allow longer sequences if its answer was cut off"
            )
    return listed


def _count_tokens(batches: Iterable[Batch]) -> int:
    return sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)


def _cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another precision."""
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        # The grouped matrix product that experts use by default has no float64 form.
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def _head(model: nn.Module) -> str:
    """Name of the output head's weight, as `named_parameters` has it; none without one."""
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    return next((name for name, p in model.named_parameters() if p is head), "")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _inference_behaviour(model: nn.Module) -> Iterator[None]:
    """Gradients on, dropout off; the training flags are put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
