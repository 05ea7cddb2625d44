"""Collects the pieces of each parameter's per-example gradients while a batch runs.

Which rows of an activation belong to which example, how often a parameter was read, and which
parameters still have to go the slow way is known here.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch
from perta.engine.gradients.powers import Means, Piece, Segments, add_pieces
from perta.parallel import count, summed


class Recorder:
    """Turns pieces of per-example gradients into means of their powers.

    `names` has the recorded parameters that were not dropped, `shape` is (B, T) of the batch, and
    `counting` says that the forward pass runs for the first time and is no recomputation.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        means: Mapping[str, Means],
        head: nn.Parameter | None,
    ) -> None:
        self._parameters, self._head = tuple(parameters.values()), head
        self.names = {parameter: name for name, parameter in parameters.items()}
        self.means = means
        self.counting = False
        self._seen: set[nn.Parameter] = set()
        self._uses: Counter[nn.Parameter] = Counter()
        self._waiting: defaultdict[nn.Parameter, list[Piece]] = defaultdict(list)
        self.shape = (0, 0)
        self._lengths: tuple[int, ...] = ()
        self._labelled: tuple[int, ...] = ()
        self._counts = True

    def start(self, batch: Batch, counts: bool) -> None:
        """Forget the last batch and take note of the layout of this one, and whether it counts."""
        self._counts = counts
        self._uses.clear()
        self._waiting.clear()
        self.shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._lengths = batch.lengths()
        self._labelled = tuple((batch.labels[:, 1:] != IGNORE).sum(1).tolist())
        self.counting = True

    @torch.no_grad()
    def finish(self) -> None:
        """Add the parameters with several uses."""
        for parameter, pieces in self._waiting.items():
            if parameter in self.names and not self._add(parameter, pieces):
                self.drop(parameter)
        self._waiting.clear()

    def agree(self) -> None:
        """Drop what processes do not use alike: to means in parts all of them add together."""
        uses = torch.tensor([self._uses[parameter] for parameter in self._parameters])
        sums, squares = summed(torch.stack((uses, uses.square())))
        same = (count() * squares == sums.square()).tolist()
        for parameter, is_same in zip(self._parameters, same, strict=True):
            if not is_same:
                self.drop(parameter)

    def _add(self, parameter: nn.Parameter, pieces: Sequence[Piece]) -> bool:
        with self.means[self.names[parameter]].adding(self._counts) as means:
            return add_pieces(means, pieces)

    @property
    def silent(self) -> set[str]:
        """Names of the parameters that are recorded and of which no piece ever came."""
        return {name for parameter, name in self.names.items() if parameter not in self._seen}

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

    def record(self, parameter: nn.Parameter, piece: Piece) -> None:
        """Take a piece of a gradient; those of a shared parameter wait: the power is of the sum."""
        self._seen.add(parameter)
        if not self.handles(parameter):
            return
        if self._uses[parameter] == 1:
            self._add(parameter, [piece])
        else:
            self._waiting[parameter].append(piece)

    def record_experts(self, parameter: nn.Parameter, pieces: Iterable[tuple[int, Piece]]) -> None:
        """Take pieces of the gradients of experts, each of one, of a stacked parameter (E, …)."""
        self._seen.add(parameter)
        if not self.handles(parameter):
            return
        if self._uses[parameter] != 1:
            # Pieces of different calls would have to meet before the power.
            self._waiting[parameter] = []
            return
        with self.means[self.names[parameter]].adding(self._counts) as means:
            for expert, piece in pieces:
                own = {order: mean[expert] for order, mean in means.by_order.items()}
                add_pieces(Means(own, means.weight), [piece])

    def rows_are_tokens(self, leading: Sequence[int]) -> bool:
        """Whether an activation of this leading shape has one row per token of the batch."""
        batch, length = self.shape
        return tuple(leading) in ((batch, length), (batch * length,))

    def segments(self, leading: Sequence[int], weight: nn.Parameter) -> Segments | None:
        """Rows of each example in an activation of these leading dimensions; None if not known."""
        batch, length = self.shape
        if weight is self._head and tuple(leading) == (1, sum(self._labelled)):
            return consecutive(self._labelled)
        if self.rows_are_tokens(leading):
            # The gradient is zero at padding: leave those rows out.
            return tuple((i * length, i * length + n) for i, n in enumerate(self._lengths))
        if len(leading) >= 2 and leading[0] == batch:
            return consecutive((math.prod(leading[1:]),) * batch)
        return None

    def example_of_token(self, device: torch.device) -> Tensor:
        """Example of each token of the batch, (B * T,) int64."""
        batch, length = self.shape
        return torch.arange(batch, device=device).repeat_interleave(length)

    def token_ids(self, ids: Tensor) -> Tensor | None:
        """Ids given per token, (B, T); those given once for all examples are repeated."""
        batch, length = self.shape
        return ids.expand(batch, length) if ids.shape in ((batch, length), (1, length)) else None

    def can_repeat(self, like: Tensor) -> bool:
        """Whether parameters repeated for each example can meet an activation."""
        batch, length = self.shape
        leading = like.shape[:-1]
        return tuple(leading) == (batch * length,) or (len(leading) >= 2 and leading[0] == batch)


def consecutive(lengths: Iterable[int]) -> Segments:
    """Segments of the given lengths, one after the other."""
    stops = tuple(itertools.accumulate(lengths))
    return tuple(zip((0, *stops), stops, strict=False))
