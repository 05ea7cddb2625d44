"""Mean powers of per-example gradients, at about the cost of one training pass.

For every requested order p > 0

    I_p[name] = (1/N) sum_x |d loss(theta; x) / d theta|^p,

the mean over examples of a power of each example's own gradient. The power has to be taken
before the sum over the batch, so the gradient autograd hands out, already summed, is of no use.

    example_loop_moments   one example at a time through autograd: slow, the reference
    batched_moments        the engine: one forward and one backward pass per batch
    abs_of_mean            the power of the mean gradient: cheaper, and a different quantity
    verify_engine          stops where engine and reference differ

How the engine works. While the model runs forward, every operation that reads a parameter
(linear maps, embeddings, norms, stacked experts) is replaced by one that computes the same
values, but whose backward step hands the layer's input and output gradient to a `_Recorder`
instead of forming the gradient of the parameter. The recorder forms each example's gradient
in small blocks, adds its powers to running sums and forgets it.

Nothing is taken on trust: autograd is asked for the gradients of all parameters all the same.
A parameter that was read only by replaced operations has none left. Any other still has one,
and is computed by the example loop instead, with a line in the log that says so.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from perta.batch import IGNORE, Batch
from perta.errors import ConfigError, DataError, EmptyDatasetError, EngineMismatchError
from perta.objectives import example_losses

logger = logging.getLogger("perta")

Progress = Callable[[int], None]
"""Called after each batch with the number of examples finished so far."""

Segments = tuple[tuple[int, int], ...]
"""For each example the half-open range of rows of a flattened activation that belongs to it."""

Sums = dict[float, Tensor]
"""Order -> running sum over examples of |gradient|^order."""


@dataclass(frozen=True)
class Moments:
    """Mean powers of gradients.

    Attributes:
        by_order: order -> parameter name -> float32 tensor of the parameter's shape, >= 0.
        examples: number of examples the mean is over.
        tokens: number of labelled tokens in them.
        fallback: names of the parameters that took the slow path, in the model's order.
    """

    by_order: dict[float, dict[str, Tensor]]
    examples: int
    tokens: int
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
    """Mean powers of per-example gradients, one example at a time through autograd.

    Args:
        model: causal language model; parameters that do not require a gradient are left out.
        batches: padded examples; padding is cut off before each example runs.
        orders: powers p > 0.
        dtype: precision to compute and accumulate in; a copy of the model is cast to it.
            The model's own, and float32 accumulators, by default.
        progress: told the number of examples finished.

    Returns:
        The moments, float32, on the model's device.

    Raises:
        ConfigError: an order is not a positive finite number.
        DataError: an example has no labelled token.
        EmptyDatasetError: no examples.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    if dtype is not None:
        model = _cast_copy(model, dtype)
    sums = _zero_sums(_trained(model), orders)
    with _inference_behaviour(model):
        _add_example_loop(model, listed, sums, progress)
    return _means(sums, listed)


def abs_of_mean(
    model: nn.Module,
    batches: Iterable[Batch],
    orders: Sequence[float],
    *,
    progress: Progress | None = None,
) -> Moments:
    """Power of the magnitude of the mean gradient: |(1/N) sum_x d loss(x) / d theta|^p.

    Gradients of different examples cancel here before the power is taken. That makes it
    cheaper than the mean of powers, and a different quantity.

    Args:
        model: causal language model; parameters that do not require a gradient are left out.
        batches: padded examples.
        orders: powers p > 0.
        progress: told the number of examples finished.

    Returns:
        The powers, float32, on the model's device.

    Raises:
        ConfigError: an order is not a positive finite number.
        DataError: an example has no labelled token.
        EmptyDatasetError: no examples.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    parameters = _trained(model)
    total = {name: _zeros_like(parameter) for name, parameter in parameters.items()}
    finished = 0
    with _inference_behaviour(model):
        for batch in listed:
            loss = example_losses(model, batch.to(_device(model))).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    accumulated.add_(gradient)
            finished += len(batch)
            if progress is not None:
                progress(finished)
    by_order = {
        order: {name: _power(value / finished, order).float() for name, value in total.items()}
        for order in orders
    }
    return Moments(by_order, finished, _count_tokens(listed))


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

    Equal to `example_loop_moments` up to rounding, whatever the batch size, the padding and
    the order of the rows.

    Args:
        model: causal language model; parameters that do not require a gradient are left out.
        batches: right-padded examples.
        orders: powers p > 0; several cost little more than one.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
        accumulate_on: device of the running sums; the parameter's own by default. "cpu" spares
            the accelerator one float32 copy of the model per order.
        progress: told the number of examples finished.

    Returns:
        The moments, float32, on the device of the sums.

    Raises:
        ConfigError: an order is not a positive finite number, or the model has no layers
            that can be checkpointed.
        DataError: an example has no labelled token.
        EmptyDatasetError: no examples.
    """
    orders = _checked_orders(orders)
    listed = _checked_batches(batches)
    parameters = _trained(model)
    sums = _zero_sums(parameters, orders, accumulate_on)
    recorder = _Recorder(parameters, sums)
    with _inference_behaviour(model), ExitStack() as stack:
        stack.enter_context(_replaced_modules(model, recorder))
        if gradient_checkpointing:
            stack.enter_context(_checkpointed_layers(model, recorder))
        finished = 0
        for batch in listed:
            _run_batch(model, batch, recorder)
            finished += len(batch)
            if progress is not None:
                progress(finished)
    fast = set(recorder.names.values())
    slow = tuple(name for name in parameters if name not in fast)
    _run_fallback(model, listed, sums, slow)
    return _means(sums, listed, slow)


def verify_engine(
    model: nn.Module,
    examples_batches: Iterable[Batch],
    orders: Sequence[float],
    tolerance: float = 1e-3,
) -> None:
    """Compare the engine with the example loop and stop on a difference.

    The error of a tensor is the largest difference of its elements over its largest element.
    For orders below 1 both sides are first raised to 1/p: near zero such a power magnifies
    rounding (a gradient off by 1e-8 is off by 1e-4 in its square root).

    Args:
        model: causal language model.
        examples_batches: a few examples.
        orders: powers p > 0.
        tolerance: largest error allowed.

    Raises:
        EngineMismatchError: some tensors differ by more; the message names them.
    """
    listed = list(examples_batches)
    fast = batched_moments(model, listed, orders)
    slow = example_loop_moments(model, listed, orders)
    bad = [
        f"{name} (order {order:g}, relative error {error:.2g})"
        for order, tensors in slow.by_order.items()
        for name, expected in tensors.items()
        # Written so that NaN counts as a difference.
        if not (error := _relative_error(fast.by_order[order][name], expected, order)) <= tolerance
    ]
    if bad:
        compared = sum(len(tensors) for tensors in slow.by_order.values())
        raise EngineMismatchError(
            f"{len(bad)} of {compared} importance tensors from the batched engine differ from "
            f"the example-by-example loop by more than {tolerance:g}: {'; '.join(bad[:8])}"
            f"{'; …' if len(bad) > 8 else ''}. Use the example loop for this model."
        )


def _run_batch(model: nn.Module, batch: Batch, recorder: _Recorder) -> None:
    """Add one batch to the sums; drop parameters that autograd still had to differentiate."""
    handled = list(recorder.names)
    if not handled:
        return
    recorder.start(batch, model)
    with _Capture(recorder):
        loss = example_losses(model, batch.to(_device(model))).sum()
    recorder.counting = False
    gradients = torch.autograd.grad(loss, handled, allow_unused=True)
    recorder.finish()
    for parameter, gradient in zip(handled, gradients, strict=True):
        if gradient is not None:
            recorder.drop(parameter)


def _run_fallback(
    model: nn.Module, batches: Sequence[Batch], sums: Mapping[str, Sums], slow: Sequence[str]
) -> None:
    """Compute the named parameters with the example loop, replacing what is in their sums."""
    if not slow:
        return
    logger.warning(
        "importance example by example, which is slower, for what the batched engine has "
        "no rule for: %s",
        ", ".join(slow),
    )
    for name in slow:
        for total in sums[name].values():
            total.zero_()
    with _inference_behaviour(model):
        _add_example_loop(model, batches, {name: sums[name] for name in slow}, None)


def _add_example_loop(
    model: nn.Module,
    batches: Iterable[Batch],
    sums: Mapping[str, Sums],
    progress: Progress | None,
) -> None:
    """Add |gradient|^p of every example to the sums of the named parameters."""
    parameters = [p for name, p in model.named_parameters() if name in sums]
    finished = 0
    for batch in batches:
        for example in _single_examples(batch.to(_device(model))):
            loss = example_losses(model, example).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for totals, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    _add_powers(totals, gradient.unsqueeze(0))
            finished += 1
        if progress is not None:
            progress(finished)


def _single_examples(batch: Batch) -> Iterator[Batch]:
    """Cut a batch into its examples, without their padding."""
    for i, length in enumerate(_lengths(batch)):
        rows = slice(i, i + 1)
        yield Batch(
            batch.input_ids[rows, :length],
            batch.attention_mask[rows, :length],
            batch.labels[rows, :length],
            batch.index[rows],
        )


# --- what one parameter's gradient is made of -------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """Per-example gradients left_b^T right_b, of shape (m, n).

    Attributes:
        left: (R, m), rows of all examples.
        right: (R, n).
        segments: rows of each example.
    """

    left: Tensor
    right: Tensor
    segments: Segments


@dataclass(frozen=True)
class _Rows:
    """Per-example gradients that are zero but for a few rows of the parameter.

    Attributes:
        ids: (R,) int64, row of the parameter.
        values: (R, n), added to that row; an id may come more than once.
        example: (R,) int64, example of each.
    """

    ids: Tensor
    values: Tensor
    example: Tensor


@dataclass(frozen=True)
class _Direct:
    """Per-example gradients as they are: (B, *shape)."""

    values: Tensor


_Piece = _Product | _Rows | _Direct


class _Recorder:
    """Turns pieces of per-example gradients into sums of their powers.

    Attributes:
        names: recorded parameter -> name; a dropped parameter is no longer in it.
        sums: name -> order -> running sum.
        counting: the forward pass is running, for the first time and not as a recomputation.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Sums]) -> None:
        self.names = {parameter: name for name, parameter in parameters.items()}
        self.sums = sums
        self.counting = False
        self._uses: Counter[nn.Parameter] = Counter()
        self._waiting: defaultdict[nn.Parameter, list[_Piece]] = defaultdict(list)
        self._shape = (0, 0)
        self._lengths: tuple[int, ...] = ()
        self._labelled: tuple[int, ...] = ()
        self._head: object = None

    def start(self, batch: Batch, model: nn.Module) -> None:
        """Forget the last batch and take note of the layout of this one."""
        self._uses.clear()
        self._waiting.clear()
        self._shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._lengths = _lengths(batch)
        self._labelled = tuple((batch.labels[:, 1:] != IGNORE).sum(1).tolist())
        self._head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
        self.counting = True

    @torch.no_grad()
    def finish(self) -> None:
        """Add the parameters with several uses."""
        for parameter, pieces in self._waiting.items():
            if not _add_pieces(self.sums[self.names[parameter]], pieces):
                self.drop(parameter)
        self._waiting.clear()

    def drop(self, parameter: nn.Parameter) -> None:
        """Leave a parameter to the fallback."""
        self.names.pop(parameter, None)

    def handles(self, parameter: object) -> bool:
        """Whether the gradient of a parameter is recorded."""
        return isinstance(parameter, nn.Parameter) and parameter in self.names

    def used(self, *parameters: object) -> None:
        """Count one use of each parameter in the forward pass."""
        if self.counting:
            self._uses.update(cast(nn.Parameter, p) for p in parameters if self.handles(p))

    def record(self, parameter: nn.Parameter, piece: _Piece) -> None:
        """Take a piece of a parameter's gradient.

        A parameter with one use is finished at once. The uses of a shared one wait for each
        other, because the power is taken of their sum.
        """
        if self._uses[parameter] == 1:
            _add_pieces(self.sums[self.names[parameter]], [piece])
        else:
            self._waiting[parameter].append(piece)

    def record_expert(self, parameter: nn.Parameter, expert: int, piece: _Piece) -> None:
        """Take a piece of the gradient of one expert of a stacked parameter (E, …)."""
        if self._uses[parameter] != 1:
            # Pieces of different calls would have to meet before the power.
            self._waiting[parameter] = []
            return
        totals = self.sums[self.names[parameter]]
        _add_pieces({order: total[expert] for order, total in totals.items()}, [piece])

    def rows_are_tokens(self, leading: Sequence[int]) -> bool:
        """Whether an activation of this leading shape has one row per token of the batch."""
        batch, length = self._shape
        return tuple(leading) in ((batch, length), (batch * length,))

    def segments(self, leading: Sequence[int], weight: nn.Parameter) -> Segments | None:
        """Rows of each example in an activation, or None where they are not known.

        Args:
            leading: shape of the activation without its last dimension.
            weight: the weight it meets; the output head sees labelled positions only.
        """
        batch, length = self._shape
        if weight is self._head and tuple(leading) == (1, sum(self._labelled)):
            return _consecutive(self._labelled)
        if self.rows_are_tokens(leading):
            # The gradient is zero at padding: leave those rows out.
            return tuple((i * length, i * length + n) for i, n in enumerate(self._lengths))
        if len(leading) >= 2 and leading[0] == batch:
            return _consecutive((math.prod(leading[1:]),) * batch)
        return None

    def example_of_token(self, device: torch.device) -> Tensor:
        """Example of each token of the batch, (B * T,) int64."""
        batch, length = self._shape
        return torch.arange(batch, device=device).repeat_interleave(length)

    def token_ids(self, ids: Tensor) -> Tensor | None:
        """Ids given per token, (B, T); those given once for all examples are repeated."""
        batch, length = self._shape
        return ids.expand(batch, length) if ids.shape in ((batch, length), (1, length)) else None

    def can_repeat(self, like: Tensor) -> bool:
        """Whether the example of each row of an activation is known to `repeated`."""
        batch, length = self._shape
        leading = like.shape[:-1]
        return tuple(leading) == (batch * length,) or (len(leading) >= 2 and leading[0] == batch)

    def repeated(self, parameter: nn.Parameter, like: Tensor) -> Tensor:
        """A 1-D parameter repeated for each example, to be broadcast against `like`.

        Returns:
            (B, 1, …, n) for `like` of shape (B, …, n); (B * T, n) for one of that shape.
        """
        batch, length = self._shape
        if like.dim() >= 3:
            return _expand(parameter, (batch, *(1,) * (like.dim() - 2)), self)
        rows = _expand(parameter, (batch, 1), self)
        return rows.expand(batch, length, -1).reshape(batch * length, -1)


def _consecutive(lengths: Iterable[int]) -> Segments:
    """Segments of the given lengths, one after the other."""
    stops = tuple(itertools.accumulate(lengths))
    return tuple(zip((0, *stops), stops, strict=False))


# --- replaced operations ----------------------------------------------------------------------


class _Capture(TorchFunctionMode):
    """While active, operations that read recorded parameters are replaced."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled():
            result = replacement(self.recorder, *args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x W^T + b, or x W + b for weights stored transposed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        transposed: bool,
        segments: Segments,
        recorder: _Recorder,
    ) -> Tensor:
        recorder.used(weight, bias)
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.transposed = weight, bias, transposed
        ctx.segments, ctx.recorder = segments, recorder
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        weight, bias, recorder = ctx.weight, ctx.bias, ctx.recorder
        outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (inputs, outputs) if ctx.transposed else (outputs, inputs)
        recorder.record(weight, _Product(left, right, ctx.segments))
        if recorder.handles(bias):
            recorder.record(bias, _Direct(_segment_sums(outputs, ctx.segments)))
        back = None
        if ctx.needs_input_grad[0]:
            back = gradient @ (weight.t() if ctx.transposed else weight)
        return back, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, one per token of the batch."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: nn.Parameter, padding_idx: int | None, recorder: _Recorder
    ) -> Tensor:
        recorder.used(weight)
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx, ctx.recorder = weight, padding_idx, recorder
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        ids, values = ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        example = ctx.recorder.example_of_token(ids.device)
        if ctx.padding_idx is not None:
            # Autograd gives the row of padding_idx no gradient, wherever the token stands.
            kept = ids != ctx.padding_idx % ctx.weight.shape[0]
            ids, values, example = ids[kept], values[kept], example[kept]
        ctx.recorder.record(ctx.weight, _Rows(ids, values, example))
        return None, None, None, None


class _Expand(torch.autograd.Function):
    """A 1-D parameter repeated for each example: the repeats' gradients are the examples'."""

    @staticmethod
    def forward(
        ctx: Any, parameter: nn.Parameter, leading: tuple[int, ...], recorder: _Recorder
    ) -> Tensor:
        recorder.used(parameter)
        ctx.parameter, ctx.recorder = parameter, recorder
        return parameter.expand(*leading, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (gradient,) = gradients
        ctx.recorder.record(ctx.parameter, _Direct(gradient.reshape(gradient.shape[0], -1)))
        return None, None, None


class _Experts(torch.autograd.Function):
    """x_e W_e^T + b_e for rows sorted by expert, and by example within an expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        transposed: bool,
        groups: Mapping[int, Segments],
        recorder: _Recorder,
    ) -> Tensor:
        recorder.used(weight, bias)
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.transposed = weight, bias, transposed
        ctx.groups, ctx.recorder = groups, recorder
        result = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
        for expert, segments in groups.items():
            rows = slice(segments[0][0], segments[-1][1])
            matrix = weight[expert].t() if transposed else weight[expert]
            result[rows] = F.linear(x[rows], matrix, None if bias is None else bias[expert])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        weight, bias, recorder = ctx.weight, ctx.bias, ctx.recorder
        left, right = (x, gradient) if ctx.transposed else (gradient, x)
        back = torch.empty_like(x)
        for expert, segments in ctx.groups.items():
            rows = slice(segments[0][0], segments[-1][1])
            matrix = weight[expert].t() if ctx.transposed else weight[expert]
            back[rows] = gradient[rows] @ matrix
            if recorder.handles(weight):
                recorder.record_expert(weight, expert, _Product(left, right, segments))
            if recorder.handles(bias):
                sums = _segment_sums(gradient, segments)
                recorder.record_expert(bias, expert, _Direct(sums))
        return back, None, None, None, None, None


def _expand(parameter: nn.Parameter, leading: tuple[int, ...], recorder: _Recorder) -> Tensor:
    return cast(Tensor, _Expand.apply(parameter, leading, recorder))  # type: ignore[no-untyped-call]


def _linear(
    recorder: _Recorder, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    return _recorded_linear(recorder, x, weight, bias, transposed=False)


def _addmm(
    recorder: _Recorder, bias: Tensor, x: Tensor, weight: Tensor, **scales: float
) -> Tensor | None:
    """The form of transformers' Conv1D: bias + x W."""
    if scales or bias.dim() != 1:
        return None
    return _recorded_linear(recorder, x, weight, bias, transposed=True)


def _recorded_linear(
    recorder: _Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Tensor | None:
    if not recorder.handles(weight) or weight.dim() != 2:
        return None
    if bias is not None and bias.requires_grad and not recorder.handles(bias):
        return None
    segments = recorder.segments(x.shape[:-1], cast(nn.Parameter, weight))
    if segments is None:
        return None
    result = _Linear.apply(x, weight, bias, transposed, segments, recorder)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


def _embedding(
    recorder: _Recorder,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001 - has a meaning with max_norm only
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001 - a storage format of the gradient, not its value
) -> Tensor | None:
    # max_norm edits the table, scale_grad_by_freq counts tokens over the whole batch.
    if not recorder.handles(weight) or max_norm is not None or scale_grad_by_freq:
        return None
    per_token = recorder.token_ids(ids)
    if per_token is None:
        return None
    result = _Embedding.apply(per_token, weight, padding_idx, recorder)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


def _layer_norm(
    recorder: _Recorder,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    return _affine(
        recorder, x, weight, bias, lambda: F.layer_norm(x, normalized_shape, None, None, eps)
    )


def _rms_norm(
    recorder: _Recorder,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    return _affine(recorder, x, weight, None, lambda: F.rms_norm(x, normalized_shape, None, eps))


def _affine(
    recorder: _Recorder,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
) -> Tensor | None:
    """Scale and shift normalised activations by parameters repeated for each example."""
    vectors = [p for p in (weight, bias) if p is not None]
    if not any(recorder.handles(p) for p in vectors) or not recorder.can_repeat(x):
        return None
    if any(p.dim() != 1 for p in vectors):
        return None

    def copies(parameter: Tensor) -> Tensor:
        if not recorder.handles(parameter):
            return parameter
        return recorder.repeated(cast(nn.Parameter, parameter), x)

    result = normalized()
    if weight is not None:
        result = result * copies(weight)
    if bias is not None:
        result = result + copies(bias)
    return result


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}


# --- replaced modules -------------------------------------------------------------------------


@contextmanager
def _replaced_modules(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Give norms and stacked experts a forward pass that records their parameters."""
    with ExitStack() as stack:
        for module in model.modules():
            direct = dict(module.named_parameters(recurse=False))
            if not any(recorder.handles(p) for p in direct.values()):
                continue
            if _is_stacked_experts(module):
                forward = _experts_forward(module, recorder)
            elif _may_be_elementwise(module, direct):
                forward = _elementwise_forward(module, direct, recorder)
            else:
                continue
            stack.enter_context(_with_forward(module, forward))
        yield


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of a module's own parameters for a while."""
    own = {name: module._parameters[name] for name in values}
    # The registry itself, because attributes accept nothing but an nn.Parameter.
    module._parameters.update(values)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(own)


def _may_be_elementwise(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a module is a leaf with vectors only, such as the many RMSNorm classes."""
    return (
        not any(True for _ in module.children())
        and all(p.dim() == 1 for p in parameters.values())
        # These call one fused operation, which `_Capture` replaces.
        and not isinstance(module, nn.LayerNorm | nn.RMSNorm)
    )


def _elementwise_forward(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], recorder: _Recorder
) -> Callable[..., Any]:
    """Run a module with its parameters repeated for each example, if that means the same.

    With one copy of the weight per example, autograd's gradient of the copies is the gradient
    per example, whatever formula the module has: w * x, (1 + w) * x, with casts or without.
    """
    original = module.forward
    verdicts: list[bool] = []

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return original(x, *args, **kwargs)
        if not verdicts:
            verdicts.append(_is_elementwise(module, original, parameters, x))
        recorded = {n: p for n, p in parameters.items() if recorder.handles(p)}
        if not verdicts[0] or not recorder.can_repeat(x):
            return original(x)
        copies = {n: recorder.repeated(p, x) for n, p in recorded.items()}
        with _with_parameters(module, copies):
            return original(x)

    return forward


@torch.no_grad()
def _is_elementwise(
    module: nn.Module,
    forward: Callable[..., Any],
    parameters: Mapping[str, nn.Parameter],
    x: Tensor,
) -> bool:
    """Whether each example's output follows from its own input and its own copy of the weights.

    Two different examples with two different copies are run together and one by one.
    """
    if any(p.shape[0] != x.shape[-1] for p in parameters.values()):
        return False
    rows = x.flatten(0, -2)[:8]
    pair = torch.stack((rows, rows.flip(0)))
    copies = {
        name: torch.stack((p, p.flip(0) * 0.5 + 0.25)).unsqueeze(1)
        for name, p in parameters.items()
    }
    try:
        with _with_parameters(module, copies):
            together = forward(pair)
        apart = []
        for i in range(2):
            with _with_parameters(module, {name: c[i, 0] for name, c in copies.items()}):
                apart.append(forward(pair[i : i + 1]))
        return torch.allclose(together, torch.cat(apart), rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        # The module does not take a weight of this shape.
        return False


def _is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' stacked experts, with weights (E, …, …)."""
    return (
        all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
        and hasattr(module, "down_proj")
        and hasattr(module, "gate_up_proj" if module.has_gate else "up_proj")
        and not getattr(module, "_is_expert_parallel", False)
    )


def _experts_forward(module: Any, recorder: _Recorder) -> Callable[..., Any]:
    """The forward pass of stacked experts with recorded linear maps."""
    original = module.forward
    first = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn

    def linear(x: Tensor, name: str, groups: Mapping[int, Segments]) -> Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        result = _Experts.apply(  # type: ignore[no-untyped-call]
            x, getattr(module, name), bias, module.is_transposed, groups, recorder
        )
        return cast(Tensor, result)

    def forward(hidden: Tensor, index: Tensor, share: Tensor) -> Any:
        if not torch.is_grad_enabled() or not recorder.rows_are_tokens(hidden.shape[:-1]):
            return original(hidden, index, share)
        # One row per token and chosen expert, sorted by expert; examples stay in order.
        chosen, order = index.reshape(-1).sort(stable=True)
        token = order // index.shape[-1]
        groups = _expert_groups(chosen, recorder.example_of_token(hidden.device)[token])
        x = linear(activate(linear(hidden[token], first, groups)), "down_proj", groups)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        x = x * share.reshape(-1)[order].unsqueeze(-1)
        # Back to the order of tokens and summed there, which is deterministic everywhere.
        back = torch.empty_like(x).index_copy(0, order, x)
        return back.reshape(*index.shape, -1).sum(1).to(hidden.dtype)

    return forward


def _expert_groups(expert: Tensor, example: Tensor) -> dict[int, Segments]:
    """Consecutive rows of each (expert, example) pair.

    Args:
        expert: (S,) int64, ascending.
        example: (S,) int64, ascending within an expert.
    """
    pairs, counts = torch.stack((expert, example), 1).unique_consecutive(dim=0, return_counts=True)
    groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    segments = _consecutive(counts.tolist())
    for chosen, segment in zip(pairs[:, 0].tolist(), segments, strict=True):
        groups[chosen].append(segment)
    return {chosen: tuple(parts) for chosen, parts in groups.items()}


@contextmanager
def _checkpointed_layers(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Recompute the activations of each decoder layer in the backward pass.

    The library's own switch needs training mode, which would turn dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that support it. "
            "Turn it off, and lower the batch size if memory is short."
        )

    def contexts() -> tuple[Any, Any]:
        # The recomputation runs in the backward pass, outside the capture of the forward pass.
        return nullcontext(), _Capture(recorder)

    with ExitStack() as stack:
        for layer in layers:
            forward = functools.partial(
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
            stack.enter_context(_with_forward(layer, forward))
        yield


# --- sums of powers ---------------------------------------------------------------------------

_CACHE_BYTES = 384 << 10
"""Size per thread of the block that an example's gradient is formed in on a CPU.

A block is written by a matrix product, read back and added to an equal block of each sum. It
has to fit in a core's second-level cache with them, and be tall enough for the product to run
at full speed."""

_DEVICE_BYTES = 256 << 20
"""Size of the block that a whole batch's gradients are formed in on an accelerator."""


def _add_pieces(totals: Sums, pieces: Sequence[_Piece]) -> bool:
    """Add the powers of the gradients that the pieces add up to.

    Returns:
        Whether the combination of pieces is one there is a rule for.
    """
    products = [piece for piece in pieces if isinstance(piece, _Product)]
    rows = [piece for piece in pieces if isinstance(piece, _Rows)]
    direct = [piece.values for piece in pieces if isinstance(piece, _Direct)]
    if not pieces or (direct and (products or rows)):
        return False
    if direct:
        _add_powers(totals, functools.reduce(torch.add, direct))
    if rows:
        _add_rows(totals, rows, products)
    if products:
        _add_products(totals, products)
    return True


def _add_powers(totals: Sums, gradients: Tensor) -> None:
    """Add the powers of per-example gradients (B, *shape)."""
    for order, total in totals.items():
        powers = _power(gradients.to(total.dtype), order).sum(0)
        total.add_(powers.to(total.device))


def _add_rows(totals: Sums, rows: Sequence[_Rows], products: Sequence[_Product]) -> None:
    """Add the powers of the parameter's rows that an embedding touched.

    Where products reach the same parameter (a tied output head), their share of the touched
    rows is added before the power is taken, and taken out of the products, so that the rest of
    them can be treated as if there were no embedding.
    """
    height, width = next(iter(totals.values())).shape
    dtype = next(iter(totals.values())).dtype
    ids = torch.cat([piece.ids for piece in rows])
    example = torch.cat([piece.example for piece in rows])
    keys, place = (example * height + ids).unique(return_inverse=True)
    gradients = torch.zeros(len(keys), width, dtype=dtype, device=ids.device)
    values = torch.cat([piece.values for piece in rows]).to(dtype)
    gradients.index_put_((place,), values, accumulate=True)
    touched = keys % height
    for product in products:
        bounds = torch.arange(len(product.segments) + 1, device=keys.device) * height
        starts = torch.searchsorted(keys, bounds).tolist()
        for (low, high), (start, stop) in zip(
            itertools.pairwise(starts), product.segments, strict=True
        ):
            left, columns = product.left[start:stop], touched[low:high]
            share = left[:, columns].to(dtype).t() @ product.right[start:stop].to(dtype)
            gradients[low:high] += share
            left.index_fill_(1, columns, 0)
    for order, total in totals.items():
        powers = _power(gradients, order).to(total.device)
        # Unlike index_add_, this is deterministic on every device.
        total.index_put_((touched.to(total.device),), powers, accumulate=True)


def _add_products(totals: Sums, products: Sequence[_Product]) -> None:
    """Add the powers of sum_k left_kb^T right_kb of each example b."""
    devices = {products[0].left.device, next(iter(totals.values())).device}
    if devices == {torch.device("cpu")}:
        _add_products_in_cache(totals, products)
    else:
        _add_products_together(totals, products)


def _add_products_in_cache(totals: Sums, products: Sequence[_Product]) -> None:
    """Send blocks of the parameter's rows through all examples in turn, in one small buffer."""
    total = next(iter(totals.values()))
    height, width = total.shape
    budget = _CACHE_BYTES * torch.get_num_threads()
    block = min(height, max(16, budget // (width * total.element_size()) // 16 * 16))
    examples = _factors(products, total.dtype, block)
    # Everything is cut into views beforehand: thousands of small slices would cost as much
    # time as the sums.
    adders = [(_adder(order), total.split(block)) for order, total in totals.items()]
    buffer = torch.empty(block, width, dtype=total.dtype)
    for k, first in enumerate(adders[0][1]):
        gradient = buffer[: len(first)]
        targets = [(add, blocks[k]) for add, blocks in adders]
        for factors in examples:
            for i, (left, right) in enumerate(factors):
                gradient.addmm_(left[k], right, beta=1 if i else 0)
            for add, target in targets:
                add(target, gradient)


def _factors(
    products: Sequence[_Product], dtype: torch.dtype, block: int
) -> list[list[tuple[tuple[Tensor, ...], Tensor]]]:
    """For each example with any rows, the factors of its gradient.

    Returns:
        Per example a list of left factors, transposed and cut into (block, rows), and right
        factors (rows, n).
    """
    by_example: defaultdict[int, list[tuple[tuple[Tensor, ...], Tensor]]] = defaultdict(list)
    for product in products:
        left, right = product.left.to(dtype).t(), product.right.to(dtype)
        for b, (start, stop) in enumerate(product.segments):
            if stop > start:
                blocks = left[:, start:stop].split(block)
                by_example[b].append((blocks, right[start:stop]))
    return list(by_example.values())


def _add_products_together(totals: Sums, products: Sequence[_Product]) -> None:
    """Form the gradients of all examples at once, in blocks of rows that fit in memory.

    An accelerator wants few large operations, and its memory is fast enough to do without
    the cache.
    """
    total = next(iter(totals.values()))
    height, width = total.shape
    left = torch.cat([_stacked(p.left, p.segments) for p in products], 1).transpose(1, 2)
    right = torch.cat([_stacked(p.right, p.segments) for p in products], 1)
    block = max(1, _DEVICE_BYTES // (left.shape[0] * width * total.element_size()))
    for low in range(0, height, block):
        high = min(low + block, height)
        gradients = _batched_product(left[:, low:high], right, total.dtype)
        for order, total in totals.items():
            # The norm over examples raises and adds in one pass over memory.
            powers = torch.linalg.vector_norm(gradients, order, dim=0).pow_(order)
            total[low:high].add_(powers.to(total.device))


def _stacked(rows: Tensor, segments: Segments) -> Tensor:
    """Rows of each example, padded with zeros: (R, n) -> (B, longest, n)."""
    return nn.utils.rnn.pad_sequence([rows[start:stop] for start, stop in segments], True)


def _batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, m, T) @ (B, T, n) summed and returned in `dtype`, whatever the inputs'."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        try:
            return torch.bmm(left, right, out_dtype=dtype)
        except (TypeError, RuntimeError):
            # Before torch 2.8, or on a GPU without such a product.
            pass
    return torch.bmm(left.to(dtype), right.to(dtype))


def _adder(order: float) -> Callable[[Tensor, Tensor], object]:
    """A function that adds |gradient|^order to a sum; it may take the sign off the gradient."""
    if order == 2:
        return lambda total, gradient: total.addcmul_(gradient, gradient)
    if order == 1:
        # In place, in cache: no other order sees the sign.
        return lambda total, gradient: total.add_(gradient.abs_())
    return lambda total, gradient: total.add_(_power(gradient, order))


def _power(gradient: Tensor, order: float) -> Tensor:
    """|gradient|^order, a new tensor."""
    if order == 2:
        return gradient.square()
    magnitude = gradient.abs()
    return magnitude if order == 1 else magnitude.pow_(order)


def _segment_sums(rows: Tensor, segments: Segments) -> Tensor:
    """Sum of the rows of each example: (R, n) -> (B, n)."""
    return torch.stack([rows[start:stop].sum(0) for start, stop in segments])


# --- small helpers ----------------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _zero_sums(
    parameters: Mapping[str, nn.Parameter],
    orders: Sequence[float],
    device: torch.device | str | None = None,
) -> dict[str, Sums]:
    return {
        name: {order: _zeros_like(parameter, device) for order in orders}
        for name, parameter in parameters.items()
    }


def _zeros_like(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Zeros to accumulate in: float64 for a float64 parameter, float32 for any other."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(parameter.shape, dtype=dtype, device=device or parameter.device)


def _means(
    sums: Mapping[str, Sums], batches: Sequence[Batch], fallback: tuple[str, ...] = ()
) -> Moments:
    """Divide sums by the number of examples, in place."""
    examples = sum(len(batch) for batch in batches)
    by_order: dict[float, dict[str, Tensor]] = {}
    for name, totals in sums.items():
        for order, total in totals.items():
            by_order.setdefault(order, {})[name] = total.div_(examples).float()
    return Moments(by_order, examples, _count_tokens(batches), fallback)


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


def _lengths(batch: Batch) -> tuple[int, ...]:
    """Number of real tokens of each example."""
    return tuple(batch.attention_mask.sum(1).tolist())


def _cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in another precision."""
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        # The grouped matrix product that experts use by default has no float64 form.
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


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


def _relative_error(actual: Tensor, expected: Tensor, order: float) -> float:
    """Largest difference over largest expected value; compared as |g| for orders below 1."""
    if order < 1:
        actual, expected = actual.pow(1 / order), expected.pow(1 / order)
    scale = expected.abs().max()
    difference = (actual.to(expected.device) - expected).abs().max()
    return float(difference / scale) if scale > 0 else float(difference)
