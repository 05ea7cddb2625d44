"""Weights as quantised models hold them: rounded, and back to plain numbers.

For a weight w, where a group is a run of inputs of one output row (`nf4`: of the flat matrix):

    int8   rows         s = max|w| / 127,                     w' = s round(w / s)
    int4   128 inputs   s = (max(w, 0) - min(w, 0)) / 15,     w' = s (clamp(round(w / s) + z) - z)
                        z = round(-min(w, 0) / s), clamped to 0 … 15
    nf4    64 values    s = max|w|,                           w' = s · the nearest of 16 values
    q8_0, q4_0          32 inputs, s in float16: the `gguf` package's own, there and back

Source: int8 Dettmers et al., arXiv 2208.07339, section 2; int4 round to nearest as the baseline of
Frantar et al., arXiv 2210.17323; nf4 Dettmers et al., arXiv 2305.14314, appendix E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor

from perta.models.layers import find_slots, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INT4_GROUP, _NF4_GROUP, _GGUF_GROUP = 128, 64, 32
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, scaled to [-1, 1], one of them 0."""


def _int8_rows(weight: Tensor) -> Tensor:
    """One scale per output: (out, in) float32 -> the same shape."""
    scale = _nonzero(weight.abs().amax(1, keepdim=True) / 127)
    return (weight / scale).round() * scale


def _int4_groups(weight: Tensor) -> Tensor:
    """A scale and a zero point per 128 inputs: (out, in) float32 -> the same shape."""
    groups = _cut(weight, _INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    scale = _nonzero((high.clamp(min=0) - low) / 15)
    zero = (-low / scale).round()
    steps = ((groups / scale).round() + zero).clamp(0, 15)
    return ((steps - zero) * scale).reshape(len(weight), -1)[:, : weight.shape[1]]


def _nf4(weight: Tensor) -> Tensor:
    """A scale per 64 values of the flat matrix, values from a book: any shape -> the same."""
    groups = _cut(weight.reshape(1, -1), _NF4_GROUP)
    scale = _nonzero(groups.abs().amax(-1, keepdim=True))
    book = torch.tensor(_NF4, device=weight.device)
    # A value halfway between two of the book goes to the lower one.
    near = torch.bucketize(groups / scale, (book[1:] + book[:-1]) / 2)
    return (book[near] * scale).flatten()[: weight.numel()].view_as(weight)


def _gguf(name: str, weight: Tensor) -> Tensor:
    """A type of GGUF files, there and back: (out, in) float32 -> the same shape."""
    from gguf import GGMLQuantizationType, quants

    if weight.shape[1] % _GGUF_GROUP:
        return weight  # the format has no such rows; converters leave them as they are
    kind = GGMLQuantizationType[name]
    found = quants.dequantize(quants.quantize(weight.cpu().numpy(), kind), kind)
    return torch.from_numpy(found).to(weight.device)


SCHEMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "int8": _int8_rows,
    "int4": _int4_groups,
    "nf4": _nf4,
    "q8_0": partial(_gguf, "Q8_0"),
    "q4_0": partial(_gguf, "Q4_0"),
}


@contextmanager
@torch.no_grad()
def rounded(model: PreTrainedModel, scheme: str) -> Iterator[None]:
    """The weights of all linear layers but the head's, rounded by a scheme for a while."""
    kept: dict[str, Tensor] = {}
    try:
        for name, place in find_slots(model):
            parameter = model.get_parameter(name)
            kept.setdefault(name, parameter.detach().clone())
            turned = is_transposed(model.get_submodule(name.rpartition(".")[0]))
            matrix = parameter[place] if parameter.dim() == 3 else parameter
            found = SCHEMES[scheme]((matrix.T if turned else matrix).float())
            matrix.copy_(found.T if turned else found)
        yield
    finally:
        for name, values in kept.items():
            model.get_parameter(name).copy_(values)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _cut(weight: Tensor, size: int) -> Tensor:
    """Rows cut into groups, the last one filled with zeros: (rows, groups, size)."""
    return F.pad(weight, (0, -weight.shape[1] % size)).reshape(len(weight), -1, size)
