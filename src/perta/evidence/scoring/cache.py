"""Keys and values of token prefixes, kept so that they are computed once.

A prefix is a row of a left-padded batch: real tokens end at the last column, so that
continuations start in the same column for every row. Positions are counted from the true
start of a row and never from its padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from perta.models.loss import head_at


@dataclass(frozen=True)
class Masking:
    """Which tokens attention sees."""

    pad_id: int  # token written into padding, which attention never sees
    # A token id that attention does not see anywhere (published behaviour where the end-of-turn
    # token serves as padding); None hides nothing.
    hidden_id: int | None = None
    # Hidden tokens take no position (published behaviour when generating); else they count.
    skip_hidden: bool = False


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of B prefixes."""

    cache: DynamicCache  # one entry of W columns per layer
    mask: Tensor  # (B, W) int64, 1 where attention looks
    columns: tuple[int, ...]  # real tokens of each row, hidden ones included; W is the largest
    positions: tuple[int, ...]  # position of the token that comes next in each row

    def __len__(self) -> int:
        return len(self.columns)

    def take(self, rows: Sequence[int]) -> Prefixes:
        """Some rows, in any order and any number of times, without needless padding."""
        width = max(self.columns[i] for i in rows)
        index = torch.tensor(rows, device=self.mask.device)
        same = list(rows) == list(range(len(self)))

        def select(values: Tensor) -> Tensor:
            kept = values[:, :, values.shape[2] - width :]
            return kept if same else kept.index_select(0, index)

        return Prefixes(
            _map_cache(self.cache, select),
            self.mask[:, self.mask.shape[1] - width :].index_select(0, index),
            tuple(self.columns[i] for i in rows),
            tuple(self.positions[i] for i in rows),
        )

    def join(self, other: Prefixes) -> Prefixes:
        """The rows of both."""
        width = max(self.mask.shape[1], other.mask.shape[1])

        def widened(values: Tensor, axis_from_end: int) -> Tensor:
            missing = width - values.shape[-axis_from_end]
            return (
                F.pad(values, (0,) * (2 * axis_from_end - 2) + (missing, 0)) if missing else values
            )

        joined = [
            (torch.cat([widened(a, 2), widened(c, 2)]), torch.cat([widened(b, 2), widened(d, 2)]))
            for (a, b), (c, d) in zip(_pairs(self.cache), _pairs(other.cache), strict=True)
        ]
        return Prefixes(
            _cache_of(joined),
            torch.cat([widened(self.mask, 1), widened(other.mask, 1)]),
            self.columns + other.columns,
            self.positions + other.positions,
        )


@dataclass(frozen=True)
class Extended:
    """Result of feeding tokens behind prefixes."""

    logits: Tensor  # (N, V) at the wanted places, in the order they were asked for
    cache: DynamicCache  # keys and values of prefixes and new tokens; new tokens are right-padded
    mask: Tensor  # (B, columns of the cache)
    start: int  # column of the first new token
    before: tuple[tuple[int, int], ...]  # the prefixes' rows (columns, positions)
    tokens: tuple[tuple[int, ...], ...]  # what was fed
    masking: Masking

    def keep(self, rows: Sequence[int], fed: Sequence[int]) -> Prefixes:
        """Prefixes that end after the first `fed[j]` new tokens of row `rows[j]`."""
        index = torch.tensor(rows, device=self.mask.device)
        columns = [self.before[i][0] + n for i, n in zip(rows, fed, strict=True)]
        positions = [
            self.before[i][1] + _positions_taken(self.tokens[i][:n], self.masking)
            for i, n in zip(rows, fed, strict=True)
        ]
        width = max(columns)
        # Column c of the new layout comes from column c - width + start + fed of the old one.
        shift = torch.tensor([self.start + n - width for n in fed], device=self.mask.device)
        source = torch.arange(width, device=self.mask.device) + shift[:, None]
        real = torch.arange(width, device=self.mask.device) >= width - torch.tensor(
            columns, device=self.mask.device
        ).unsqueeze(1)
        source = source.clamp_min(0)

        def move(values: Tensor) -> Tensor:
            _, heads, _, size = values.shape
            where = source[:, None, :, None].expand(-1, heads, -1, size)
            return values.index_select(0, index).gather(2, where)

        mask = self.mask.index_select(0, index).gather(1, source) * real
        return Prefixes(_map_cache(self.cache, move), mask, tuple(columns), tuple(positions))


def extend(
    model: PreTrainedModel,
    prefixes: Prefixes | None,
    tokens: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int]],
    masking: Masking,
) -> Extended:
    """Forward pass over tokens that follow prefixes; the output head runs where asked only.

    `tokens` are B rows of at least one each behind B `prefixes`, None where they start their
    sequences. `wanted` are N (row, place among that row's new tokens) whose next-token logits are
    needed.
    """
    device = model.device
    length = max(len(row) for row in tokens)
    rows = [list(row) + [masking.pad_id] * (length - len(row)) for row in tokens]
    seen = [[_seen(t, masking) for t in row] + [0] * (length - len(row)) for row in tokens]
    before = (
        tuple(zip(prefixes.columns, prefixes.positions, strict=True))
        if prefixes
        else ((0, 0),) * len(tokens)
    )
    places = [
        _places(row, start, length, masking) for row, (_, start) in zip(tokens, before, strict=True)
    ]
    mask = torch.tensor(seen, device=device)
    # The model appends to the cache it is given; a shallow copy leaves the prefixes as they are.
    cache = _map_cache(prefixes.cache, lambda values: values) if prefixes else DynamicCache()
    if prefixes:
        mask = torch.cat([prefixes.mask, mask], dim=1)
    row_index = torch.tensor([row for row, _ in wanted], dtype=torch.int64, device=device)
    column_index = torch.tensor([place for _, place in wanted], dtype=torch.int64, device=device)
    with head_at(model, row_index, column_index):
        output = model(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=mask,
            position_ids=torch.tensor(places, device=device),
            use_cache=True,
            **{_cache_argument(model): cache},
        )
    return Extended(
        output.logits[0],
        cache,
        mask,
        mask.shape[1] - length,
        before,
        tuple(tuple(row) for row in tokens),
        masking,
    )


def supports_prefixes(model: PreTrainedModel) -> bool:
    """Whether prefixes of this model can be cut, joined and continued.

    Needs explicit positions, and plain keys and values in every layer: recurrent states cannot
    be cut, and layers that share another's keys have none of their own.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        {"position_ids", _cache_argument(model)}
        <= inspect.signature(model.forward).parameters.keys()
        and not getattr(model, "_is_stateful", False)
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "num_kv_shared_layers", 0)
        and kinds <= {"full_attention", "sliding_attention"}
    )


def _cache_argument(model: PreTrainedModel) -> str:
    """What a model calls the cache it is given: transformers renamed it in 5.24."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _map_cache(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A new cache with changed keys and values; the old one is left alone."""
    return _cache_of([(change(keys), change(values)) for keys, values in _pairs(cache)])


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each (B, heads, W, size)."""
    layers: Any = cache.layers  # filled, each by a pass of a model that `supports_prefixes`
    return [(layer.keys, layer.values) for layer in layers]


def _cache_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of these tensors themselves; `update` would copy them."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _seen(token: int, masking: Masking) -> int:
    return int(token != masking.hidden_id)


def _positions_taken(tokens: Sequence[int], masking: Masking) -> int:
    if masking.skip_hidden:
        return sum(_seen(token, masking) for token in tokens)
    return len(tokens)


def _places(tokens: Sequence[int], start: int, length: int, masking: Masking) -> list[int]:
    """Position of each token; padding repeats the last one, whatever it is nobody looks."""
    places, position = [], start
    for token in tokens:
        takes = _positions_taken((token,), masking)
        places.append(position if takes else max(position - 1, 0))
        position += takes
    return places + [places[-1]] * (length - len(places))
