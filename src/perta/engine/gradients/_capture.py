"""Operations and modules that hand the gradients of their parameters to a recorder.

Each computes the same values as what it replaces, but its backward step gives the recorder the
layer's input and output gradient instead of forming the gradient of the parameter.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from perta.engine.gradients._recorder import Recorder, consecutive
from perta.engine.gradients.powers import Direct, Product, Rows, Segments, segment_sums
from perta.errors import ConfigError
from perta.models.experts import blocks, expert_names, is_stacked_experts, with_forward

# --- replaced operations ----------------------------------------------------------------------


class Capture(TorchFunctionMode):
    """While active, operations that read recorded parameters are replaced."""

    def __init__(self, recorder: Recorder) -> None:
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
        recorder: Recorder,
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
        recorder.record(weight, Product(left, right, ctx.segments))
        if recorder.handles(bias):
            recorder.record(bias, Direct(segment_sums(outputs, ctx.segments)))
        back = None
        if ctx.needs_input_grad[0]:
            back = gradient @ (weight.t() if ctx.transposed else weight)
        return back, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, one per token of the batch."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: nn.Parameter, padding_idx: int | None, recorder: Recorder
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
        ctx.recorder.record(ctx.weight, Rows(ids, values, example))
        return None, None, None, None


class _Expand(torch.autograd.Function):
    """A 1-D parameter repeated for each example: the repeats' gradients are the examples'."""

    @staticmethod
    def forward(
        ctx: Any, parameter: nn.Parameter, leading: tuple[int, ...], recorder: Recorder
    ) -> Tensor:
        recorder.used(parameter)
        ctx.parameter, ctx.recorder = parameter, recorder
        return parameter.expand(*leading, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (gradient,) = gradients
        ctx.recorder.record(ctx.parameter, Direct(gradient.reshape(gradient.shape[0], -1)))
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
        recorder: Recorder,
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
        groups = ctx.groups.items()
        if recorder.handles(weight):
            recorder.record_experts(weight, ((e, Product(left, right, s)) for e, s in groups))
        if recorder.handles(bias):
            sums = ((e, Direct(segment_sums(gradient, s))) for e, s in groups)
            recorder.record_experts(bias, sums)
        return back, None, None, None, None, None


def _expand(recorder: Recorder, parameter: nn.Parameter, *leading: int) -> Tensor:
    return cast(Tensor, _Expand.apply(parameter, leading, recorder))  # type: ignore[no-untyped-call]


def _repeated(recorder: Recorder, parameter: nn.Parameter, like: Tensor) -> Tensor:
    """A 1-D parameter repeated for each example, (B, 1, …, n), or (B * T, n) as `like` may be."""
    batch, length = recorder.shape
    if like.dim() >= 3:
        return _expand(recorder, parameter, batch, *(1,) * (like.dim() - 2))
    rows = _expand(recorder, parameter, batch, 1)
    return rows.expand(batch, length, -1).reshape(batch * length, -1)


def _addmm(
    recorder: Recorder, bias: Tensor, x: Tensor, weight: Tensor, **scales: float
) -> Tensor | None:
    """The form of transformers' Conv1D: bias + x W."""
    if scales or bias.dim() != 1:
        return None
    return _linear(recorder, x, weight, bias, transposed=True)


def _linear(
    recorder: Recorder,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
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
    recorder: Recorder,
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
    recorder: Recorder,
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
    recorder: Recorder,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    return _affine(recorder, x, weight, None, lambda: F.rms_norm(x, normalized_shape, None, eps))


def _affine(
    recorder: Recorder,
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
        return _repeated(recorder, cast(nn.Parameter, parameter), x)

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
def replaced_modules(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Give norms and stacked experts a forward pass that records their parameters."""
    with ExitStack() as stack:
        for module in model.modules():
            direct = dict(module.named_parameters(recurse=False))
            if not any(p.requires_grad for p in direct.values()):
                continue
            if is_stacked_experts(module):
                forward = _experts_forward(module, recorder)
            elif _may_be_elementwise(module, direct):
                forward = _elementwise_forward(module, recorder)
            else:
                continue
            stack.enter_context(with_forward(module, forward))
        yield


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
        # These call one fused operation, which `Capture` replaces.
        and not isinstance(module, nn.LayerNorm | nn.RMSNorm)
    )


def _elementwise_forward(module: nn.Module, recorder: Recorder) -> Callable[..., Any]:
    """Run a module with its parameters repeated for each example, if that means the same."""
    original = module.forward
    verdicts: list[bool] = []

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return original(x, *args, **kwargs)
        # Of a model in parts they are whole only now.
        parameters = dict(module.named_parameters(recurse=False))
        if not verdicts:
            verdicts.append(_is_elementwise(module, original, parameters, x))
        recorded = {n: p for n, p in parameters.items() if recorder.handles(p)}
        if not verdicts[0] or not recorder.can_repeat(x):
            return original(x)
        copies = {n: _repeated(recorder, p, x) for n, p in recorded.items()}
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
    """Whether two examples with two copies of the weights give together what they give alone."""
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


def _experts_forward(module: Any, recorder: Recorder) -> Callable[..., Any]:
    """The forward pass of stacked experts with recorded linear maps."""
    original = module.forward
    first, second = expert_names(module)
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
        x = linear(activate(linear(hidden[token], first, groups)), second, groups)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        x = x * share.reshape(-1)[order].unsqueeze(-1)
        # Back to the order of tokens and summed there, which is deterministic everywhere.
        back = torch.empty_like(x).index_copy(0, order, x)
        return back.reshape(*index.shape, -1).sum(1).to(hidden.dtype)

    return forward


def _expert_groups(expert: Tensor, example: Tensor) -> dict[int, Segments]:
    """Consecutive rows of each (expert, example) pair, (S,) both, ascending, experts first."""
    pairs, counts = torch.stack((expert, example), 1).unique_consecutive(dim=0, return_counts=True)
    groups: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for chosen, segment in zip(pairs[:, 0].tolist(), consecutive(counts.tolist()), strict=True):
        groups[chosen].append(segment)
    return {chosen: tuple(parts) for chosen, parts in groups.items()}


@contextmanager
def checkpointed_layers(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Recompute layers in the backward pass; the library's own way would turn dropout on."""
    layers = blocks(model)
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that support it. "
            "Turn it off, and lower the batch size if memory is short."
        )

    def contexts() -> tuple[Any, Any]:
        # The recomputation runs in the backward pass, outside the capture of the forward pass.
        return nullcontext(), Capture(recorder)

    with ExitStack() as stack:
        for layer in layers:
            forward = functools.partial(
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
            )
            stack.enter_context(with_forward(layer, forward))
        yield
